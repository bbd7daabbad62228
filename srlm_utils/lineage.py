"""The names of a run's models, and which is made from which.

M0 is the seed model, SFT the baseline, M1, M2 ... the rounds' models; F2 is the draft of M2.
"""

import re

OUTSIDE = "outside"  # the judge that is no model of a run (outside.py)


def model_names(iterations: int) -> list[str]:
    """M0, SFT, M1 ... M<iterations>: the order in which figures show them."""
    return ["M0", "SFT", *(f"M{i}" for i in range(1, iterations + 1))]


def is_model_name(name: str) -> bool:
    """Whether a name is M0, SFT, M1 ...; a draft's is none."""
    return name == "SFT" or re.fullmatch(r"M\d+", name) is not None


def is_draft(name: str) -> bool:
    """Whether a name is that of a draft: F2 is what M2 would be without the answers that F2 itself writes."""
    return re.fullmatch(r"F\d+", name) is not None


def is_of_run(name: str) -> bool:
    """Whether a run has a model of this name: one of its own or a draft."""
    return is_model_name(name) or is_draft(name)


def models_before(model: str) -> list[str]:
    """Models that exist before `model` or its draft does."""
    return [] if model == "M0" else ["M0"] if model == "SFT" else model_names(int(model[1:]))[:-1]


def init_model(model: str) -> str:
    """The model that `model` is trained from: M0 for SFT and M1 (both supervised), else the previous one."""
    return "M0" if model in ("SFT", "M1") else f"M{int(model[1:]) - 1}"


def next_model(model: str) -> str:
    return f"M{int(model[1:]) + 1}"


def draft_of(model: str) -> str:
    return f"F{model[1:]}"


def weights(model: str) -> str:
    """Artefact that stands for a model: a pointer for M0, a folder for the others."""
    return "M0/model.json" if model == "M0" else f"{model}/model"
