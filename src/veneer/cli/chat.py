"""`veneer chat`: talk to a tuned model, to its base, or to both side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.errors import DebugFlag, UserError
from veneer.cli.quiet import quiet_libraries
from veneer.cli.shared import BaseOption, MaxNewTokens, ModelArgument, Seed, System, Temperature, TopP

if TYPE_CHECKING:
    from veneer.cli.generation import Sampling
    from veneer.train.use import Loaded

__all__ = ["Conversation", "chat"]

HELP = """/adapter       answer with the tuned model
/base          answer with the base model
/both          answer with each
/system TEXT   set the system message
/reset         forget the conversation
/quit          leave"""


@dataclass
class Conversation:
    """The turns so far, and who answers: ``adapter``, ``base`` or ``both``."""

    loaded: Loaded
    sampling: Sampling
    who: str
    write: Callable[[str], None]
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """The conversation as the chat template takes it."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def say(self, text: str) -> None:
        """One turn of the user, and the answer or answers to it; the tuned one is what is remembered.

        A model that was trained on single questions gets each one on its own.
        """
        if self.loaded.asking.single:
            self.turns.clear()
        self.turns.append({"role": "user", "content": text})
        answer = ""
        for who in ("base", "adapter") if self.who == "both" else (self.who,):
            if self.who == "both":
                self.write(f"[{who}] ")
            answer = self._answer(who)
            self.write("\n")
        self.turns.append({"role": "assistant", "content": answer})

    def _answer(self, who: str) -> str:
        from veneer.cli.generation import stream

        plain = nullcontext() if who == "adapter" else self.loaded.without_adapter()
        with plain:
            return stream(
                self.loaded.model,
                self.loaded.tokenizer,
                self.messages(),
                self.sampling,
                self.write,
                chat=self.loaded.asking.chat,
            )

    def command(self, line: str) -> bool:
        """Obey a line that begins with a slash; False when it asks to leave."""
        name, _, rest = line[1:].partition(" ")
        if name in {"quit", "exit", "q"}:
            return False
        if name in {"base", "adapter", "both"}:
            if self.loaded.adapter is None and name != "base":
                self.write("there is no adapter here: this is a base model\n")
            else:
                self.who = name
                self.write(f"answers: {name}\n")
        elif name == "system":
            self.system = rest.strip() or None
            self.turns.clear()
            self.write("system message set, conversation cleared\n" if rest.strip() else "system message removed\n")
        elif name == "reset":
            self.turns.clear()
            self.write("conversation cleared\n")
        else:
            self.write(HELP + "\n")
        return True


def _lines(interactive: bool) -> Iterator[str]:
    """What the user types, or the lines of a pipe, until the end of either."""
    while True:
        try:
            line = input("\n› " if interactive else "")
        except EOFError:
            return
        if line.strip():
            yield line.strip()


def _say(talk: Conversation, line: str, interactive: bool) -> None:
    """One turn; Ctrl-C at the keyboard cuts the answer short and keeps the conversation as it was."""
    before = list(talk.turns)
    try:
        talk.say(line)
    except KeyboardInterrupt:
        if not interactive:
            raise
        talk.turns = before
        talk.write("\n(stopped)\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def chat(
    model: ModelArgument,
    base: BaseOption = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this and leave.")] = None,
    system: System = None,
    who: Annotated[str, typer.Option("--answer-with", help="adapter, base or both.")] = "adapter",
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    debug: DebugFlag = False,
) -> None:
    """Talk to a tuned model in the terminal; in a script, --prompt or a pipe of lines."""
    if who not in {"adapter", "base", "both"}:
        raise UserError(f"--answer-with {who!r} is none of adapter, base, both", hint="Leave it out for the adapter.")
    loaded = _load(model, base)
    from veneer.cli.generation import Sampling

    talk = Conversation(
        loaded=loaded,
        sampling=Sampling(max_new_tokens, temperature, top_p, seed=seed),
        who=who if loaded.adapter is not None else "base",
        write=_write,
        system=loaded.asking.system if system is None else system,
    )
    if prompt is not None:
        talk.say(prompt)
        return
    interactive = sys.stdin.isatty()
    if interactive:
        if sys.platform != "win32":
            import readline  # noqa: F401  arrow keys and history in input()
        _write(f"{loaded.adapter or loaded.base_name} on {loaded.base_name}. /help lists the commands.\n{HELP}\n")
    for line in _lines(interactive):
        if not line.startswith("/"):
            _say(talk, line, interactive)
        elif not talk.command(line):
            return


def _load(model: str, base: str | None) -> Any:
    from veneer.train.use import load

    quiet_libraries()
    loaded = load(model, base=base)
    if not loaded.task.writes:
        hint = f"It was trained for {loaded.purpose.task}: veneer predict {model} --text '...' prints its answers."
        raise UserError("this model does not chat", where=model, hint=hint)
    return loaded
