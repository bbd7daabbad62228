"""What 10_benchmarks is asked for, checked before any model loads."""

from types import SimpleNamespace

from srlm_utils import alpaca_eval, api, harness, mt_bench
from srlm_utils.paths import seed_path


def load(params: dict) -> tuple[list[dict], list[dict]]:
    """(AlpacaEval's instructions, MT-Bench's questions) that flat parameters name; [] for what is not asked for.

    Raises `MissingInputError` or `DataError` for a file that cannot be used, and `ParamError` where tasks of
    lm-evaluation-harness are asked for and it is not installed, or a judge behind an endpoint and there is no key.
    """
    if params["mt_bench_file"] and (judge := mt_bench.api_judge(params["mt_bench_judge"])):
        api.Api.from_params(judge, SimpleNamespace(**params)).check_key()
    if params["lm_eval_tasks"]:
        harness.require()
    limit = params["max_rows"]
    instructions, questions = params["alpaca_eval_file"], params["mt_bench_file"]
    return (
        alpaca_eval.load_instructions(seed_path(instructions), limit) if instructions else [],
        mt_bench.load_questions(seed_path(questions), limit) if questions else [],
    )
