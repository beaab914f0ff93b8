"""InternLM2's chat format: turns between <|im_start|> and <|im_end|>, with tools named after the role."""

from collections.abc import Mapping, Sequence

from internlm2.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "environment")
_TOOLS = {"plugin": "<|plugin|>", "interpreter": "<|interpreter|>"}
_PROMPT = "assistant\n"


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool = True,
    as_generated: bool = False,
) -> list[int]:  # fmt: skip
    """Ids of a conversation: <s>, then for each message <|im_start|>role[ name=...]\\ncontent<|im_end|>\\n.

    The ids are those of the released chat template, which tokenises all text between two control tokens together. If a content
    begins with a newline, this newline and the one after the role therefore become one token ("\\n\\n").

    messages: dictionaries with role (system, user, assistant, environment), content, and optionally name: "plugin" and
              "interpreter" become their control tokens, any other name stays text. An assistant's message may carry a tool
              call in `action` = {"name": "plugin" | "interpreter", "content": ...}, which is put between <|action_start|>
              and <|action_end|>
    add_generation_prompt: end with <|im_start|>assistant\\n, after which the model writes its answer
    as_generated: tokenise the line "assistant\\n" of an assistant's turn separately from the content. When a model answers,
              this line is the end of the prompt, and no token of the answer contains a part of it. True gives training
              these same tokens, so that the ids of a prompt are a prefix of the ids of the conversation that continues it.
              False gives the ids of the released template.
    Contents are text: none of them becomes a control token, whatever it spells. No system message is added.
    Errors: ValueError names the message and what is wrong, or the control token that the tokenizer lacks
    """
    missing = [name for name in ("<|im_start|>", "<|im_end|>") if name not in tokenizer.specials]
    if missing:
        raise ValueError(f"tokenizer has no special {', '.join(missing)}, which the chat format needs")
    ids = [tokenizer.bos_id]
    for number, message in enumerate(messages):
        ids += _encode_message(tokenizer, message, f"messages[{number}]", as_generated)
    if add_generation_prompt:
        ids += [tokenizer.specials["<|im_start|>"], *tokenizer.encode(_PROMPT)]
    return ids


def _encode_message(tokenizer: Tokenizer, message: Mapping[str, object], where: str, as_generated: bool) -> list[int]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} must be a mapping with the keys role and content, got {message!r}")
    unknown = sorted(set(message) - {"role", "content", "name", "action"}, key=str)
    if unknown:
        raise ValueError(f"{where} must have only the keys role, content, name, action, got {unknown[0]!r}")
    role, name, action = message.get("role"), message.get("name"), message.get("action")
    if role not in ROLES:
        raise ValueError(f"{where}: role must be one of {', '.join(ROLES)}, got {role!r}")
    content = _text(message.get("content"), f"{where}: content")
    special = tokenizer.specials
    ids = [special["<|im_start|>"]]
    if name is None and role == "assistant" and as_generated:
        ids += tokenizer.encode(_PROMPT) + tokenizer.encode(content)
    elif name is None:
        ids += tokenizer.encode(f"{role}\n{content}")
    elif isinstance(name, str) and name in _TOOLS:
        ids += [*tokenizer.encode(f"{role} name="), _special(tokenizer, _TOOLS[name], where), *tokenizer.encode(f"\n{content}")]
    elif isinstance(name, str) and name and "\n" not in name:
        ids += tokenizer.encode(f"{role} name={name}\n{content}")
    else:
        raise ValueError(f"{where}: name must be a non-empty string without a newline, got {name!r}")
    if action is not None:
        ids += _encode_action(tokenizer, role, action, where)
    return [*ids, special["<|im_end|>"], *tokenizer.encode("\n")]


def _encode_action(tokenizer: Tokenizer, role: object, action: object, where: str) -> list[int]:
    if role != "assistant" or not isinstance(action, Mapping) or action.get("name") not in tuple(_TOOLS):
        raise ValueError(
            f"{where}: action must be {{name: plugin | interpreter, content}} in a message of the assistant, got {action!r}"
            f" in a message of the role {role!r}"
        )
    content = _text(action.get("content"), f"{where}: action content")
    start, tool, end = (
        _special(tokenizer, name, where) for name in ("<|action_start|>", _TOOLS[action["name"]], "<|action_end|>")
    )
    return [start, tool, *tokenizer.encode(f"\n{content}"), end]


def _special(tokenizer: Tokenizer, name: str, where: str) -> int:
    if name not in tokenizer.specials:
        raise ValueError(f"{where}: tokenizer has no special {name}")
    return tokenizer.specials[name]


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a string, got {value!r}")
    return value
