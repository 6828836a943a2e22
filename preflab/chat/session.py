"""A chat: messages and commands in, answers of all models and votes out."""

import random
import re
import sys
from contextlib import suppress

from preflab.chat.models import Answer
from preflab.chat.votes import VotesFile
from preflab.data.messages import well_formed
from utils.errors import UserError
from utils.markdown import plain
from utils.provenance import sha256_of

HELP = """\
/1, /2, ...  this answer is better     /tie  equally good     /bad  all bad
/new         start a new conversation  /system TEXT  the same, under this system text
/help        this list                 /quit, Ctrl-D  the end"""
# A word behind a slash; a path such as /etc/hosts is a message.
COMMAND = re.compile(r"/(\w+)(?:\s+(.*))?", re.DOTALL)


class Session:
    """The state of a chat.

    Args:
        answer_of: `{name: Answer}`.
        screen: of preflab.chat.screen.
        args: system, history, blind, vote.
        seed: of the order of the models with `blind`.
    """

    def __init__(self, answer_of: dict[str, Answer], screen, votes: VotesFile, args, seed: int):
        self.answer_of, self.screen, self.votes, self.args, self.seed = answer_of, screen, votes, args, seed
        self.system = args.system
        # What each model reads in front of the next message; the same for all unless `history` is own.
        self.turns: dict[str, list[dict]] = {}
        # The last turn: {prompt of each model, answers in the order shown}; None once it is voted on.
        self.prompts, self.answers, self.voted = {}, {}, False
        self.turn = 0

    # ------------------------------------------------------------------------------------------------------- in a chat

    def converse(self) -> None:
        """Read messages and commands from stdin until it ends.

        Raises:
            UserError: a message or command failed, without a terminal. On a terminal the message is printed.
        """
        typed = sys.stdin.isatty()
        if typed:
            print(f"{plain(', '.join(self.answer_of))}. /help lists the commands, Ctrl-D ends.")
        for line in lines("you> ", typed):
            if not typed:
                print(f"\nyou> {plain(line)}")
            try:
                if not self.act(line):
                    return
            except UserError as error:
                # Whoever types can correct it; a script must not continue with other turns than it meant.
                if not typed:
                    raise
                print(f"error: {plain(str(error))}", file=sys.stderr)

    def act(self, line: str) -> bool:
        """Answer a message or obey a command; False for the one that ends the chat. Raises UserError."""
        command = COMMAND.fullmatch(line)
        if not command:
            self.answer([*self._system(), {"role": "user", "content": line}])
            return True
        word, rest = command[1].lower(), command[2]
        if rest and word != "system":
            raise UserError(f"/{word}: takes no text; /help lists the commands")
        if word in ("quit", "exit"):
            return False
        if word == "help":
            print(HELP)
        elif word in ("new", "system"):
            if word == "system":
                self.system = rest
            self.turns, self.answers, self.prompts = {}, {}, {}
            print("a new conversation")
        else:
            self.vote(word)
        return True

    def _system(self) -> list[dict]:
        return [{"role": "system", "content": self.system}] if self.system else []

    # ---------------------------------------------------------------------------------------------------- many prompts

    def answer_all(self, prompts: list[list[dict]]) -> None:
        """Answer each prompt as a conversation of its own, and read a vote after each with `args.vote`."""
        votes = lines("vote> ", sys.stdin.isatty()) if self.args.vote else None
        for number, messages in enumerate(prompts, 1):
            self.turns = {}
            if len(prompts) > 1:
                print(f"\n{number}/{len(prompts)}> {plain(messages[-1]['content'])}")
            self.answer([*([] if messages[0]["role"] == "system" else self._system()), *messages])
            if votes and not self._read_vote(votes):
                return

    def _read_vote(self, votes) -> bool:
        """Read lines until one is a vote; False at their end."""
        print("\n/1, /2, ... the better answer, /tie, /bad, /skip, /quit")
        for line in votes:
            word = line.strip().removeprefix("/").lower()
            if word in ("quit", "exit"):
                return False
            if word == "skip":
                return True
            try:
                self.vote(word)
                return True
            except UserError as error:
                if not sys.stdin.isatty():
                    raise
                print(f"error: {plain(str(error))}", file=sys.stderr)
        return False

    # ------------------------------------------------------------------------------------------------ answers and votes

    def answer(self, opening: list[dict]) -> None:
        """Answer a conversation with every model, behind what each has in its history. Raises UserError."""
        names = list(self.answer_of)
        if self.args.blind:
            random.Random(sha256_of(str(self.seed), str(self.turn), repr(opening))).shuffle(names)
        system, rest = ([], opening) if opening[0]["role"] != "system" else (opening[:1], opening[1:])
        prompts = {name: [*system, *self.turns.get(name, []), *rest] for name in names}
        answers = {}
        self.screen.start([str(k) if self.args.blind else f"{k} {name}" for k, name in enumerate(names, 1)])
        try:
            for k, name in enumerate(names):
                given = self.answer_of[name](prompts[name], lambda text, k=k: self.screen.update(k, text))
                note = f"{given['tokens']} tokens" + cut_off(given)
                self.screen.finish(k, given["text"], note + (f"; {given['note']}" if given.get("note") else ""))
                answers[name] = given["text"]
        finally:
            self.screen.close()
        # Only now: a message whose answer failed is not part of the conversation.
        self.turn += 1
        self.prompts, self.answers, self.voted = prompts, answers, False
        self._continue_with(None)

    def _continue_with(self, winner: str | None) -> None:
        """Put the last turn into the histories."""
        if self.args.history == "none":
            return
        # Without a vote the last of the models, which is tuned where base and tuned talk alone.
        preferred = winner or list(self.answer_of)[-1]
        for name, prompt in self.prompts.items():
            answer = self.answers[name if self.args.history == "own" else preferred]
            turns = prompt[1:] if prompt[0]["role"] == "system" else prompt
            self.turns[name] = [*turns, {"role": "assistant", "content": answer}]

    def vote(self, word: str) -> None:
        """Record a vote on the last turn: a number as shown, tie or bad.

        Raises:
            UserError: another word, nothing to vote on, a second vote, or models that read different conversations.
        """
        names = list(self.answers)
        with suppress(ValueError):
            word = str(int(word))
        if word not in ("tie", "bad", *(str(k) for k in range(1, len(self.answer_of) + 1))):
            raise UserError(f"/{word}: unknown command; /help lists them")
        if len(self.answer_of) < 2:
            raise UserError(f"/{word}: one model answers alone, so there is nothing to compare; add one with --models")
        if not names:
            raise UserError(f"/{word}: there is no answer to vote on yet")
        if self.voted:
            raise UserError(f"/{word}: this turn has a vote already")
        conversations = list(self.prompts.values())
        if any(prompt != conversations[0] for prompt in conversations):
            raise UserError(f"/{word}: with --history own the models read different conversations; use shared, or /new")
        winner = names[int(word) - 1] if word.isdigit() else None
        self.votes.add(conversations[0], self.answers, winner, word == "bad")
        self.voted = True
        self._continue_with(winner)
        shown = {"tie": "a tie", "bad": "all bad"}.get(word, f"{winner} is better")
        order = ", ".join(f"{k} {name}" for k, name in enumerate(names, 1))
        print(f"voted: {plain(shown)}" + (f" ({plain(order)})" if self.args.blind else ""))


def cut_off(given: dict) -> str:
    """The note on an answer that reached the token limit, else ""."""
    return ", cut off at --max_new_tokens" if given["finish_reason"] == "length" else ""


def lines(prompt: str, typed: bool):
    """Yield the lines of stdin without empty ones; `prompt` is printed on a terminal."""
    if typed:
        # Arrow keys and earlier lines; absent from some builds of Python.
        with suppress(ImportError):
            import readline  # noqa: F401
    elif hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input(prompt) if typed else next(sys.stdin).rstrip("\n")
        except StopIteration:
            return
        except EOFError:
            # The cursor is behind the prompt.
            return print()
        if line.strip():
            yield well_formed(line.strip())
