"""InternLM2's chat format: turns between <|im_start|> and <|im_end|>, tools named after the role."""

from collections.abc import Mapping, Sequence

from internlm2.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "environment")
_PLACES = {"plugin": "<|plugin|>", "interpreter": "<|interpreter|>"}


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
) -> list[int]:
    """Ids of a conversation: <s>, then for each message <|im_start|>role[ name=...]\\ncontent<|im_end|>\\n.

    messages: dictionaries with role (system, user, assistant, environment), content, and optionally name: "plugin" and
              "interpreter" become their tokens, another name stays text. An assistant's message may carry a tool call
              in `action` = {"name": "plugin" | "interpreter", "content": ...}, which is put between
              <|action_start|> and <|action_end|>
    add_generation_prompt: end with the head of an assistant's turn
    Contents are text: what they spell never becomes a control token. No system message is added.
    Errors: ValueError naming the message and what is wrong, or the special that the tokenizer lacks
    """
    missing = [name for name in ("<|im_start|>", "<|im_end|>") if name not in tokenizer.specials]
    if missing:
        raise ValueError(f"tokenizer has no special {', '.join(missing)}, which the chat format needs")
    ids = [tokenizer.bos_id]
    for number, message in enumerate(messages):
        ids += _encode_message(tokenizer, message, f"messages[{number}]")
    if add_generation_prompt:
        ids += [tokenizer.specials["<|im_start|>"], *tokenizer.encode("assistant\n")]
    return ids


def _encode_message(tokenizer: Tokenizer, message: Mapping[str, object], where: str) -> list[int]:
    unknown = sorted(set(message) - {"role", "content", "name", "action"})
    if unknown:
        raise ValueError(f"{where} must have the keys role, content, name, action, got {unknown[0]!r}")
    role, name, action = message.get("role"), message.get("name"), message.get("action")
    if role not in ROLES:
        raise ValueError(f"{where}: role must be one of {', '.join(ROLES)}, got {role!r}")
    content = _text(message.get("content"), f"{where}: content")
    special = tokenizer.specials
    if name in _PLACES:
        head = [*tokenizer.encode(f"{role} name="), _special(tokenizer, _PLACES[name], where), *tokenizer.encode("\n")]
    elif name is None:
        head = tokenizer.encode(f"{role}\n")
    elif not isinstance(name, str) or not name or "\n" in name:
        raise ValueError(f"{where}: name must be a text of one line, got {name!r}")
    else:
        head = tokenizer.encode(f"{role} name={name}\n")
    body = tokenizer.encode(content)
    if action is not None:
        if role != "assistant" or not isinstance(action, Mapping) or action.get("name") not in _PLACES:
            raise ValueError(f"{where}: action must be an assistant's {{name: plugin | interpreter, content}}, got {action!r}")
        place = _special(tokenizer, _PLACES[action["name"]], where)
        body += [_special(tokenizer, "<|action_start|>", where), place, *tokenizer.encode("\n")]
        body += tokenizer.encode(_text(action.get("content"), f"{where}: action content"))
        body.append(_special(tokenizer, "<|action_end|>", where))
    return [special["<|im_start|>"], *head, *body, special["<|im_end|>"], *tokenizer.encode("\n")]


def _special(tokenizer: Tokenizer, name: str, where: str) -> int:
    if name not in tokenizer.specials:
        raise ValueError(f"{where}: tokenizer has no special {name}")
    return tokenizer.specials[name]


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a text, got {value!r}")
    return value
