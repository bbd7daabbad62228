"""Answers of a model to prompts: the candidates of a round, and the answers to test prompts."""

from srlm_utils import chat


def write_answers(step, engine, prompts: list[dict], *, n: int, log: str, author: str = "") -> list[dict]:
    """Sample `n` answers to each prompt row, continuing the row log named `log`; all rows, by cand_id.

    The step's parameters give max_new_tokens, temperature, top_p and seed. Row: {"cand_id"
    (``<prompt_id>-<index>``), "prompt_id", "text", "n_tokens", "ended"}. Where the `author` is not the model in
    training, rows name it: "author", and the cand_id is ``<prompt_id>-<author>-<index>``.
    """
    from srlm_utils.engine import Meter

    p, rows, meter = step.params, step.log(log), Meter()
    done = {r["prompt_id"] for r in rows.rows}
    tail, named = (f"-{author}", {"author": author}) if author else ("", {})
    todo = [
        (f"{r['prompt_id']}{tail}", chat.prompt_ids(engine.tokenizer, chat.user(r["prompt"])))
        for r in prompts
        if r["prompt_id"] not in done
    ]
    batches = engine.generate(
        todo,
        n=n,
        max_new_tokens=p.max_new_tokens,
        temperature=p.temperature,
        top_p=p.top_p,
        seed=p.seed,
        on_token=meter,
    )
    with step.progress(len(todo) * n, "answers") as bar:
        for batch in batches:
            new = [{"cand_id": s.key, "prompt_id": s.key.rpartition("-")[0].removesuffix(tail)} for s in batch]
            for row, s in zip(new, batch, strict=True):
                row |= {"text": s.text, "n_tokens": s.n_tokens, "ended": s.ended} | named
            rows.extend(new)
            bar.update(len(batch))
    print(meter)
    return sorted(rows.rows, key=lambda r: r["cand_id"])
