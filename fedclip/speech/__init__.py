"""Speech by speaker: the embedded synthetic corpus and readers of recorded speech. Nothing here knows about models."""
