"""Speech recognition: features, CTC models, decoding and error rates. Nothing here knows about federation."""
