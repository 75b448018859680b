"""Settings of all the tests."""

from hypothesis import settings

# A busy machine is no failure.
settings.register_profile("fedclip", deadline=None)
settings.load_profile("fedclip")
