import numpy as np
import pytest

from gvpo_jax.collect.offline import read_groups
from gvpo_jax.data.groups import UNKNOWN, Source, cache_key
from gvpo_jax.data.prompts import EncodedPrompts, completion_ids
from gvpo_jax.errors import UserError
from gvpo_jax.models.debug import debug_tokenizer

INF, NAN = float("inf"), float("nan")


def encode(text):
    return [*text.encode(), 0]


def read(*rows, reference=5, **settings):
    return read_groups(
        EncodedPrompts(list(rows), [[1, 2]] * len(rows), skipped=0),
        encode,
        reference=reference,
        vocab_size=256,
        max_completion_length=4,
        **settings,
    )


def row(completions=("a", "bc"), rewards=(1, 0.5), **columns):
    return {"completions": list(completions), "rewards": list(rewards), **columns}


def test_texts_and_token_ids_become_groups():
    (group,) = read(row(["a", [7, 8, 9], ""], [1, 0, True])).groups
    assert group.completions.tolist() == [[[97, 0, 0], [7, 8, 9], [0, 0, 0]]]
    assert group.lengths.tolist() == [[2, 3, 1]]
    assert group.rewards.tolist() == [[1, 0, 1]]
    assert (group.source == Source.FILE).all()
    assert (group.version == UNKNOWN).all()
    assert group.prompts.tolist() == [[1, 2]]
    assert group.reference == UNKNOWN


def test_chat_completions_and_rewards_in_other_words_are_taken():
    chat = [[{"role": "assistant", "content": text}] for text in ("a", "bc")]
    (group,) = read(row(chat, [True, "0.5"])).groups
    (plain,) = read(row(rewards=[np.True_, np.float16(0.5)])).groups
    for name, value in plain._asdict().items():
        np.testing.assert_array_equal(getattr(group, name), value)
    (same,) = read(row(["a", "a", "a"], ["1", " -2e-1 ", False])).groups  # duplicates are samples
    assert same.completions.tolist() == [[[97, 0]] * 3]
    np.testing.assert_allclose(same.rewards, [[1, -0.2, 0]])


def test_an_end_mark_that_was_typed_is_the_end():
    tokenizer = debug_tokenizer()
    eos, im_end = 257, 259

    def ids(text):
        return completion_ids(text, tokenizer, (eos, im_end))

    assert ids("4") == [52, eos]
    assert ids("4<|endoftext|>") == [52, eos]
    assert ids("4<|im_end|>") == ids("4<|im_end|>\n") == [52, im_end]
    assert ids("4<|im_end|><|endoftext|>") == [52, im_end]
    assert ids("4<|im_end|>5") == [52, im_end, 53, eos]
    assert ids("<|im_end|>") == [im_end]
    assert ids("") == [eos]
    with pytest.raises(UserError, match=r"the text holds \\ud83d, half of a character"):
        ids("4\ud83d")


KEY = cache_key(5, read(row()).groups[0])
BAD = [
    (row(["a", []]), "completion 2: it has no token"),
    (row(["a", "abcd"]), "completion 2: 5 tokens; raise"),
    (row(rewards=[None, 1]), "completion 1: it has no reward"),
    (row(rewards=[1, NAN]), "completion 2: it has no reward"),
    (row(rewards=[1, -INF]), "completion 2: its reward is infinite"),
    (row(["a"], [1]), "at least two completions"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_what_can_not_be_used_is_an_error_or_counted(bad, message):
    with pytest.raises(UserError, match=rf"groups, row 2.*{message}.*bad_samples=skip"):
        read(row(), bad)
    kept = read(row(), bad, bad_samples="skip")
    assert len(kept.groups) == 1
    assert kept.skipped_groups == 1
    assert kept.skipped_completions == (0 if "at least" in message else 1)
    assert kept.groups[0].completions.shape == (1, 2, 3)  # nothing of what was left out


def test_a_group_that_keeps_two_stays():
    (group,) = read(row(["a", "b", "c"], [1, INF, 0]), bad_samples="skip").groups
    assert group.completions[0, :, 0].tolist() == [97, 99]
    assert group.rewards.tolist() == [[1, 0]]


def test_when_no_group_is_left_there_is_nothing_to_train_on():
    with pytest.raises(UserError, match="none of the 1 groups"):
        read(row(["a"], [1]), bad_samples="skip")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"rewards": [1, 2]}, "no column 'completions'; the columns are"),
        (row() | {"completions": "ab"}, "'completions' must be a list"),
        (row(["a", [{"role": "user", "content": "b"}]]), "one message of the assistant or"),
        (row(["a", [{"role": "assistant", "content": None}]]), "one message of the assistant or"),
        (row(["a", [{"role": "assistant", "content": "b"}] * 2]), "one message of the assistant"),
        (
            row(["a", {"role": "assistant", "content": "b"}]),
            "one message of the assistant",
        ),
        (row() | {"rewards": 1}, "'rewards' must be a list"),
        (row(rewards=[1, "two"]), "groups, row 2: a reward is a number, got 'two'"),
        (row(rewards=[1, [2]]), r"groups, row 2: a reward is a number, got '\[2\]'"),
        (row(rewards=[1]), "2 completions but 1 rewards"),
        (row(["a", 3]), "of the assistant or a list of token ids below 256, got '3'"),
        (row(["a", [-1]]), "token ids below 256, got"),
        (row(["a", [256]]), "token ids below 256, got"),
        (row(["a", [2**40]]), "token ids below 256, got"),
        (row(ref_logps=[[1, 1], [1, 1, 1]]), "without ref_fingerprint"),
        (row(ref_logps=[[1, 1], [1, 1]], ref_fingerprint=KEY), r"\[2, 3\], end tokens included"),
        (row(ref_logps=[[1, 1], [1, 1, NAN]], ref_fingerprint=KEY), "a finite number per token"),
        (row(ref_logps=[[1, 1], [1, 1, 10**400]], ref_fingerprint=KEY), "a finite number per"),
        (row(ref_logps=[-3.0, -4.0], ref_fingerprint=KEY), "a list per completion"),
        (row(ref_logps=[[1, 1], [1, 1, 1]], ref_fingerprint=6), "of another reference, or of"),
        (row(ref_logps=[[1, 1], [1, 1, 1]], ref_fingerprint=-1), "of another reference, or of"),
    ],
)
def test_columns_that_make_no_sense_are_errors_also_where_samples_are_skipped(bad, message):
    with pytest.raises(UserError, match=message):
        read(row(), bad, bad_samples="skip")


def test_reference_log_probs_come_along():
    cached = row(ref_logps=[[-1, -2], [-3, -4, -5]], ref_fingerprint=KEY)
    (group,) = read(cached).groups
    assert group.reference == 5
    np.testing.assert_array_equal(group.ref_logps, [[[-1, -2, 0], [-3, -4, -5]]])
    # a reference that keeps changing can't use them, and need not complain
    assert read(cached, reference=UNKNOWN).groups[0].reference == UNKNOWN


def test_numpys_numbers_and_lists_are_as_good():
    (group,) = read(row(["a", np.array([7, 8])], (np.float32(1), np.float64(0)))).groups
    assert group.completions.tolist() == [[[97, 0], [7, 8]]]
    assert group.rewards.tolist() == [[1, 0]]
