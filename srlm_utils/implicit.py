"""The implicit reward: how much likelier a text has become since an earlier model.

DPO's optimum has reward ``beta * log(policy / reference)`` up to a constant of the prompt (Rafailov et al. 2023), so
that a policy's own log-ratio says what it has come to prefer, without a judge's word.
"""

from srlm_utils import chat


def log_likelihoods(step, model: str, prompts: dict[str, str], candidates: list[dict]) -> dict[str, float]:
    """Log-likelihood (nats, summed over tokens) of each candidate behind its prompt, by cand_id.

    `prompts` are texts by prompt_id. A candidate that ended counts with its end of turn; one without any token has no
    likelihood. Continues a row log of the step.
    """
    log = step.log(f"likelihoods_{model}.jsonl")
    done, engine = {r["id"] for r in log.rows}, step.engine(model)
    requests = []
    for c in candidates:
        text = chat.answer_ids(engine.tokenizer, c["text"], ended=c["ended"])
        if text and c["cand_id"] not in done:
            prompt = chat.prompt_ids(engine.tokenizer, chat.user(prompts[c["prompt_id"]]))
            requests.append((c["cand_id"], prompt, text))
    with step.progress(len(requests), "likelihoods") as bar:
        for batch in engine.target_logprobs(requests):
            log.extend([{"id": key, "logprob": sum(found)} for key, found in batch])
            bar.update(len(batch))
    return {r["id"]: r["logprob"] for r in log.rows}


def rewards(step, policy: str, reference: str, prompts: dict[str, str], candidates: list[dict]) -> dict[str, float]:
    """``log(policy / reference)`` of each candidate in nats, without beta; one of the two in memory at a time."""
    now, before = (log_likelihoods(step, m, prompts, candidates) for m in (policy, reference))
    return {key: value - before[key] for key, value in now.items()}
