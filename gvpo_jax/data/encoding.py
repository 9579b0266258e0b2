"""A row's prompt as token ids: the chat template, special tokens, what is too long."""

import datetime
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gvpo_jax.data.rows import PlacedRow, Row, check_row, check_text
from gvpo_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANY_DAY = datetime.date(2000, 1, 1)
# How chat templates ask for the date; transformers answers with the machine's.
_DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
# Arguments of `apply_chat_template` that are not the template's.
_NOT_OF_TEMPLATES = (
    "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs",
    "return_assistant_tokens_mask",
)  # fmt: skip


class Encoder:
    """Makes token ids of rows, one after the other.

    Args:
        options: the config section `data`, see `DataConfig`.
        tokenizer: makes token ids of texts.
        vocab_size: the embedding's rows, which token ids must be below.

    Attributes:
        dated: whether the chat template writes the date.
        leaves_out: whether rows with too long a prompt are left out.

    Raises:
        UserError: an argument of the template is not the template's to be given.
    """

    def __init__(self, options: Any, tokenizer: "PreTrainedTokenizerBase", vocab_size: int | None):
        if own := [name for name in options.template_arguments if name in _NOT_OF_TEMPLATES]:
            raise UserError(f"data.template_arguments: {own[0]} is not the template's to be given")
        self._options, self._tokenizer, self._vocab_size = options, tokenizer, vocab_size
        self._today, self._checked = options.day(), False
        self.leaves_out = options.too_long == "skip"
        self.dated = writes_date(options.template or tokenizer.chat_template)

    def ids(self, row: PlacedRow) -> list[int] | None:
        """Of the row's prompt with its `answer_prefix`; None: it is too long, and left out.

        Raises:
            UserError: naming the row, where its prompt can't be encoded or is too long.
        """
        options, place = self._options, row.place
        ids = _encode(place, row, self._tokenizer, options, self._today)
        if problem := id_problem(ids, self._tokenizer, self._vocab_size):
            raise UserError(f"{place}: {problem}")
        if not self._checked and (messages := _messages(place, row, options)):
            _check_template(place, messages, self._tokenizer, options)
            self._checked = True
        if len(ids) <= options.max_prompt_length:
            return ids
        if self.leaves_out:
            return None
        raise UserError(
            f"{place}: the prompt is {len(ids)} tokens long, the limit is "
            f"{options.max_prompt_length}: raise data.max_prompt_length, or leave such rows "
            "out with data.too_long=skip"
        )

    def undated_ids(self, row: PlacedRow) -> list[int]:
        """The same with the date of one day, always the same."""
        return _encode(row.place, row, self._tokenizer, self._options, _ANY_DAY)


def writes_date(template: Any) -> bool:
    """Whether a chat template asks for the date."""
    return bool(_DATE_CALL.search(str(template)))


def id_problem(
    ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase", vocab_size: int | None
) -> str | None:
    """The token that the embedding has no row for, if there is one."""
    if vocab_size is None or max(ids, default=0) < vocab_size:
        return None
    token = tokenizer.convert_ids_to_tokens(max(ids))
    return (
        f"token {token!r} has the id {max(ids)}, but the model's embedding has only {vocab_size} "
        "rows; use the tokenizer that the model was trained with, without tokens added later"
    )


def _encode(
    place: str,
    row: Row,
    tokenizer: "PreTrainedTokenizerBase",
    options: Any,
    day: datetime.date,
) -> list[int]:
    check_row(place, row)
    messages = _messages(place, row, options)
    plain = messages is None
    text = row["prompt"] if plain else _templated(place, messages, tokenizer, options, day)
    text += row.get("answer_prefix") or ""
    try:
        check_text(text)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    ids = list(tokenizer(text, add_special_tokens=plain)["input_ids"])
    if plain:
        ids = _special_once(text, ids, tokenizer)
    if not ids:
        raise UserError(f"{place}: the prompt is empty; remove the row")
    return ids


def _special_once(text: str, ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """A plain prompt's token ids with one BOS token, and no end token that the text has not."""
    bos, eos = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos"))
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]  # the text was written by a template, which put its own
    if eos is not None and ids[-1:] == [eos] and not text.endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]  # the answer is still to come
    return ids


def _messages(place: str, row: Row, options: Any) -> list[dict] | None:
    """The chat messages that go through the template; None where the prompt is plain text."""
    prompt = row["prompt"]
    plain = isinstance(prompt, str) and options.chat_template != "always"
    for name in ("system_prompt", "template_arguments"):
        if plain and getattr(options, name) not in (None, {}):
            raise UserError(
                f"{place}: {name} needs the chat template, and this prompt is "
                "plain text; set data.chat_template=always"
            )
    if not plain and options.chat_template == "never":
        raise UserError(f"{place}: the prompt is a list of messages; set data.chat_template=auto")
    if plain:
        return None
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _check_template(
    place: str, messages: list[dict], tokenizer: "PreTrainedTokenizerBase", options: Any
) -> None:
    """Raises UserError where the chat template ignores the messages."""
    others = [{**message, "content": f"x{message['content']}x"} for message in messages]
    texts = []
    for these in (messages, others):
        try:
            texts.append(_templated(place, these, tokenizer, options, _ANY_DAY))
        except UserError:  # it looks into them
            return
    if texts[0] == texts[1]:
        raise UserError(
            f"{place}: the chat template writes the same text whatever the messages say: "
            f"{texts[0][:60]!r}; it must put them in, e.g. {{{{ messages[0]['content'] }}}}"
        )


def _templated(
    place: str,
    messages: list[dict],
    tokenizer: "PreTrainedTokenizerBase",
    options: Any,
    day: datetime.date,
) -> str:
    if options.system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": options.system_prompt}, *messages]
    if options.template is None and not tokenizer.chat_template:
        raise UserError(
            f"{place}: the tokenizer has no chat template; give one, or use plain text "
            "prompts with data.chat_template=never"
        )
    template = options.template
    try:
        if writes_date(options.template or tokenizer.chat_template):
            template = tokenizer.get_chat_template(template)
            template = _DATE_CALL.sub(lambda call: json.dumps(day.strftime(call[2])), template)
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            chat_template=template,
            **options.template_arguments,
        )
    except Exception as error:  # templates raise what they like
        raise UserError(f"{place}: the chat template failed: {_one_line(error)}") from error
    assert isinstance(text, str)
    return text


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
