"""What 10_benchmarks is asked for, checked before any model loads."""

from srlm_utils import alpaca_eval, harness, mt_bench
from srlm_utils.plan import seed_path


def load(params: dict) -> tuple[list[dict], list[dict]]:
    """(AlpacaEval's instructions, MT-Bench's questions) that flat parameters name; [] for what is not asked for.

    Raises `MissingInputError` or `DataError` for a file that cannot be used, and `ParamError` where tasks of
    lm-evaluation-harness are asked for and it is not installed.
    """
    if params["lm_eval_tasks"]:
        harness.require()
    limit = params["max_rows"]
    instructions, questions = params["alpaca_eval_file"], params["mt_bench_file"]
    return (
        alpaca_eval.load_instructions(seed_path(instructions), limit) if instructions else [],
        mt_bench.load_questions(seed_path(questions), limit) if questions else [],
    )
