"""What the server of `warm` imports: all that notebooks import sooner or later."""

import os

MPLBACKEND = "module://matplotlib_inline.backend_inline"
os.environ["MPLBACKEND"] = MPLBACKEND  # read where matplotlib is imported: figures belong under their cells

import ipykernel.kernelapp  # noqa: E402, F401
import matplotlib.pyplot  # noqa: E402, F401
import pandas  # noqa: E402, F401

import srlm_utils.checkpoints  # noqa: E402
import srlm_utils.evaluate  # noqa: E402
import srlm_utils.plots  # noqa: E402
import srlm_utils.report  # noqa: E402
import srlm_utils.train  # noqa: E402, F401
