"""Sample the candidates of the on-policy seed rows: first four distinct of six answers a prompt.

python scripts/sample_onpolicy.py PROMPTS.jsonl CANDIDATES.jsonl     rows with prompt_id and prompt

What this writes was then read, ranked, scored and justified; `onpolicy_sampling.json` keeps its settings.
"""

import sys
from pathlib import Path

from srlm_utils import chat
from srlm_utils.artefacts import read_jsonl, write_json, write_jsonl
from srlm_utils.engine import Engine
from srlm_utils.seed_model import fetch

SETTINGS = {"n": 6, "max_new_tokens": 128, "temperature": 0.7, "top_p": 0.9, "seed": 2024}
MODEL = "smollm2-135m-instruct"


def main(prompts: Path, out: Path) -> None:
    model = fetch(MODEL)
    engine = Engine(model["path"], dtype="float32", batch_size=48)
    rows = {r["prompt_id"]: r | {"replies": []} for r in read_jsonl(prompts)}
    requests = [(r["prompt_id"], chat.prompt_ids(engine.tokenizer, chat.user(r["prompt"]))) for r in rows.values()]
    for batch in engine.generate(requests, **SETTINGS):
        for s in batch:
            replies = rows[s.key.rpartition("-")[0]]["replies"]
            if s.text.strip() and s.text not in [r["text"] for r in replies] and len(replies) < 4:
                replies.append({"reply_id": s.key, "text": s.text, "n_tokens": s.n_tokens, "ended": s.ended})
        print(".", end="", flush=True)
    write_jsonl(out, list(rows.values()))
    import torch
    import transformers

    write_json(
        out.with_name("onpolicy_sampling.json"),
        SETTINGS
        | {"kept": "first 4 distinct", "model": MODEL, "weights_sha256": model["weights_sha256"], "dtype": "float32"}
        | {"batch_size": engine.batch_size, "torch": torch.__version__, "transformers": transformers.__version__},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
