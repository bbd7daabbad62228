"""Helpers behind the notebooks of the Self-Rewarding LM kit. Importing it loads nothing heavy."""

__version__ = "0.1.0"


def open_run(folder: str = "results/example"):
    """A run folder as tables and cards to read (`explore.Run`); `folder` is a path, or a name below results/."""
    from srlm_utils.explore import Run  # brings pandas

    return Run(folder)
