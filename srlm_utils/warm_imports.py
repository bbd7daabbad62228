"""What the server of `warm` imports: all that notebooks import sooner or later."""

import ipykernel.kernelapp  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import pandas  # noqa: F401

import srlm_utils.evaluate
import srlm_utils.plots
import srlm_utils.report
import srlm_utils.train  # noqa: F401
