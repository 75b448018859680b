"""Real devices on one machine: a SuperLink with TLS, SuperNodes with keys, and what to run on them."""
