"""What goes wrong with speech data: errors that name the file or value, the cause and the remedy. Nothing else."""

from fedclip.options import ConfigError


class CorpusError(ConfigError):
    """A corpus that cannot be read or built as configured: a missing folder, a wrong manifest, an unreadable recording."""


class SynthesizerError(RuntimeError):
    """The speech synthesiser is not installed, refused a request or died."""
