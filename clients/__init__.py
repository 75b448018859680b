"""The client side of a federation: the ClientApp, the message format, the per-user state and the Grid over Ray actors."""
