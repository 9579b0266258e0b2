"""The formulas of the papers, one number at a time: what the baselines are tested against.

A group is a list of its valid completions `(reward, tokens)`, a token is `(logp, old_logp,
ref_logp)`. Groups of fewer than two are left out before.
"""

import math


def as_lists(batch, where):
    groups = []
    for g in range(len(where)):
        group = []
        for i in range(len(where[g])):
            if where[g, i]:
                tokens = [
                    tuple(batch[n][g, i, t] for n in ("logps", "old_logps", "ref_logps"))
                    for t in range(batch["mask"].shape[-1])
                    if batch["mask"][g, i, t]
                ]
                group.append((batch["rewards"][g, i], tokens))
        if len(group) >= 2:
            groups.append(group)
    return groups


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def std(numbers):
    center = mean(numbers)
    return math.sqrt(sum((x - center) ** 2 for x in numbers) / (len(numbers) - 1))


def centred(group):
    center = mean(reward for reward, _ in group)
    return [reward - center for reward, _ in group]


def scaled(group):
    return [a / (std(centred(group)) + 1e-4) for a in centred(group)]


def clipped(ratio, advantage, low, high):
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def k3(token):
    return math.exp(token[2] - token[0]) - (token[2] - token[0]) - 1


def token_terms(tokens, advantage, low, high, kl_coef):
    return [
        clipped(math.exp(token[0] - token[1]), advantage, low, high) + kl_coef * k3(token)
        for token in tokens
    ]


def grpo(groups, epsilon, epsilon_high, kl_coef):
    rows = []
    for group in groups:
        for (_, tokens), advantage in zip(group, scaled(group), strict=True):
            rows.append(mean(token_terms(tokens, advantage, epsilon, epsilon_high, kl_coef)))
    return mean(rows)


def dr_grpo(groups, epsilon, kl_coef, max_completion_length):
    rows = []
    for group in groups:
        for (_, tokens), advantage in zip(group, centred(group), strict=True):
            terms = token_terms(tokens, advantage, epsilon, epsilon, kl_coef)
            rows.append(sum(terms) / max_completion_length)
    return mean(rows)


def dapo(groups, kl_coef):
    terms = []
    for group in groups:
        for (_, tokens), advantage in zip(group, scaled(group), strict=True):
            terms += token_terms(tokens, advantage, 0.2, 0.28, kl_coef)
    return mean(terms)


def rloo(groups, epsilon, kl_coef):
    rows = []
    for group in groups:
        for i, (reward, tokens) in enumerate(group):
            others = [other for j, (other, _) in enumerate(group) if j != i]
            ratio = math.prod(math.exp(token[0] - token[1]) for token in tokens)
            row = clipped(ratio, reward - mean(others), epsilon, epsilon)
            rows.append(row + kl_coef * sum(map(k3, tokens)))
    return mean(rows)


def gspo(groups, epsilon, epsilon_high, kl_coef):
    rows = []
    for group in groups:
        for (_, tokens), advantage in zip(group, scaled(group), strict=True):
            ratio = math.prod(math.exp(token[0] - token[1]) for token in tokens)
            row = clipped(ratio ** (1 / len(tokens)), advantage, epsilon, epsilon_high)
            rows.append(row + kl_coef * mean(map(k3, tokens)))
    return mean(rows)


def reinforce_pp(groups, epsilon, kl_coef):
    deviation = std([a for group in groups for a in centred(group)])
    terms = []
    for group in groups:
        for (_, tokens), advantage in zip(group, centred(group), strict=True):
            advantage /= deviation + 1e-4
            terms += token_terms(tokens, advantage, epsilon, epsilon, kl_coef)
    return mean(terms)


def rebel(groups, eta):
    losses = []
    for group in groups:
        pairs = []
        for i, (reward, tokens) in enumerate(group):
            for other, other_tokens in group[:i]:
                ratio = sum(t[0] - t[1] for t in tokens) - sum(t[0] - t[1] for t in other_tokens)
                pairs.append((ratio / eta - (reward - other)) ** 2)
        losses.append(mean(pairs))
    return mean(losses)


def dpo(groups, beta):
    pairs = []
    for group in groups:
        for reward, tokens in group:
            for other, other_tokens in group:
                if reward > other:
                    ratio = sum(t[0] - t[2] for t in tokens) - sum(
                        t[0] - t[2] for t in other_tokens
                    )
                    pairs.append(-math.log(1 / (1 + math.exp(-beta * ratio))))
    return mean(pairs)
