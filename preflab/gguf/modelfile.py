"""Ollama's Modelfile: the model's own chat template as a Go template, and its stop tokens.

Ollama does not run Jinja. The Go template is derived from how the model's template renders marker texts, and is
compared with it on conversations before it is used; a template that has no such form gets no TEMPLATE line.
"""

from dataclasses import dataclass

from preflab.data.chat_template import ChatRenderer, TemplateRefused, shared_prefix

# Conversations on which both templates must give the same text.
PROBES = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)


@dataclass
class Turns:
    """A chat template that writes a fixed text before and after each turn.

    Attributes:
        around: (before, after) the content of a turn, by role; no entry for a role that the template refuses.
        opening: text in front of everything, such as a BOS.
        default: what comes before the turns of a conversation without a system turn.
        answer: what opens the assistant's answer.
    """

    around: dict[str, tuple[str, str]]
    opening: str
    default: str
    answer: str

    def render(self, messages: list[dict]) -> str:
        """The text of a conversation that the model answers, as Ollama's engine renders `go`."""
        has_system = any(message["role"] == "system" for message in messages)
        text = self.opening + ("" if has_system else self.default)
        for message in messages:
            before, after = self.around.get(message["role"], ("", ""))
            text += f"{before}{message['content']}{after}" if message["role"] in self.around else ""
        return text + self.answer

    def go(self) -> str:
        """The template in Go's syntax, with Ollama's variables (.System is the text of all system turns)."""
        parts = [_literal(self.opening)]
        if self.default:
            parts.append(f"{{{{ if not .System }}}}{_literal(self.default)}{{{{ end }}}}")
        parts.append("{{ range .Messages }}")
        for number, (role, (before, after)) in enumerate(self.around.items()):
            condition = f'{{{{ {"else " if number else ""}if eq .Role "{role}" }}}}'
            parts.append(f"{condition}{_literal(before)}{{{{ .Content }}}}{_literal(after)}")
        parts.append("{{ end }}{{ end }}")
        return "".join([*parts, _literal(self.answer)])


def _literal(text: str) -> str:
    """Text in a Go template; braces of its own are written as a string constant."""
    return text.replace("{{", '{{ "{{" }}')


def turns_of(tokenizer, adds_bos: bool) -> Turns | None:
    """The tokenizer's chat template as fixed texts around turns; None if it has no such form.

    Args:
        adds_bos: whether llama.cpp puts a BOS in front of every prompt by itself; the template then has none.
    """
    chat = ChatRenderer(tokenizer)
    try:
        turns = _derived(chat)
        if turns is None or any(chat.prompt_text(conversation) != turns.render(chat.fold(conversation))
                                for conversation in _conversations(chat.folds_system)):  # fmt: skip
            return None
    except TemplateRefused:
        return None
    bos = tokenizer.bos_token or ""
    if adds_bos and bos:
        if turns.opening.startswith(bos):
            turns.opening = turns.opening.removeprefix(bos)
        elif turns.default.startswith(bos):
            return None
    return turns


def _message(role: str, number: int = 0) -> dict:
    return {"role": role, "content": f"{role.upper()}-PROBE-{number}"}


def _conversations(folds_system: bool) -> list[list[dict]]:
    """The probe conversations, without system turns if the template has none."""
    return [
        [_message(role, k) for k, role in enumerate(roles)]
        for roles in PROBES
        if not (folds_system and "system" in roles)
    ]


def _derived(chat: ChatRenderer) -> Turns | None:
    """The fixed texts, from the differences between renderings of marker texts."""
    user, assistant, second = _message("user"), _message("assistant", 1), _message("user", 2)
    # From the last turn backwards: what lies between two contents is the end of one turn and the start of the next.
    one, three = chat.prompt_text([user]), chat.prompt_text([user, assistant, second])
    closed = chat.full_text([user], assistant["content"])
    head, _, tail = one.partition(user["content"])
    if three.count(user["content"]) != 1 or assistant["content"] not in three or second["content"] not in three:
        return None
    middle, _, rest = three.partition(user["content"])[2].partition(assistant["content"])
    after_assistant, _, end = rest.partition(second["content"])
    assistant_after = closed.rpartition(assistant["content"])[2]
    # `tail` closes the user's turn and opens the answer; `middle` closes it and opens the assistant's turn.
    if end != tail or not after_assistant.startswith(assistant_after):
        return None
    user_before = after_assistant[len(assistant_after) :]
    if not head.endswith(user_before):
        return None
    first = head[: len(head) - len(user_before)]
    # Most templates end all turns alike. Otherwise the answer's opening counts as the end of the user's turn, which
    # renders the same text.
    same_end = tail.startswith(assistant_after) and middle.startswith(assistant_after)
    user_after = assistant_after if same_end else tail[: shared_prefix(tail, middle)]
    answer = tail[len(user_after) :]
    around = {"user": (user_before, user_after), "assistant": (middle[len(user_after) :], assistant_after)}
    if chat.folds_system:
        return Turns(around, first, "", answer)
    with_system = chat.prompt_text([_message("system"), user])
    system_head, _, after_system = with_system.partition(_message("system")["content"])
    before_user, _, _ = after_system.partition(user["content"])
    if not before_user.endswith(user_before):
        return None
    system_after = before_user[: len(before_user) - len(user_before)]
    # What a conversation with a system turn and one without share at their start belongs to neither.
    opening = chat.tokenizer.bos_token or ""
    opening = opening if system_head.startswith(opening) and first.startswith(opening) else ""
    # A BOS that opens every turn (SmolLM2) is part of the turn.
    if opening and user_before.startswith(opening):
        opening = ""
    around = {"system": (system_head.removeprefix(opening), system_after), **around}
    return Turns(around, opening, first.removeprefix(opening), answer)


def modelfile(file_name: str, turns: Turns | None, stops: list[str], system_folded: bool) -> str:
    """The text of a Modelfile.

    Args:
        file_name: of the GGUF file, in the same folder.
        stops: texts that end an answer.
        system_folded: whether the model's template has no system role.
    """
    lines = [f"FROM ./{file_name}", ""]
    if turns is None:
        lines += [
            "# The model's chat template cannot be written as one of Ollama's (Go templates); Ollama then chooses one",
            "# by the template inside the file. Compare its prompts with the model's before you rely on it.",
        ]
    else:
        lines += [f'TEMPLATE """{turns.go()}"""']
        if system_folded:
            lines += ["# The model has no system role: system messages are not rendered."]
    lines += ["", *(f"PARAMETER stop {_quoted(stop)}" for stop in stops)]
    return "\n".join(lines).rstrip() + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
