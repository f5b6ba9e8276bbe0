"""`veneer chat`: talk to a tuned model, to its base, or to both side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.errors import DebugFlag, UserError
from veneer.cli.quiet import quiet_libraries
from veneer.cli.shared import BaseOption, MaxNewTokens, ModelArgument, Seed, System, Temperature, TopP
from veneer.cli.voices import Voices
from veneer.errors import AdapterError
from veneer.train.errors import RecipeError

if TYPE_CHECKING:
    from veneer.cli.generation import Sampling

__all__ = ["Conversation", "chat"]

HELP = """/adapter       answer with the tuned model; /adapter NAME with another one
/base          answer with the base model
/both          answer with each
/all           answer with the base and every adapter
/adapters      list the adapters
/load FOLDER   load another adapter of the same base, and answer with it
/system TEXT   set the system message
/reset         forget the conversation
/quit          leave"""


@dataclass
class Conversation:
    """The turns so far, and who answers: ``adapter`` (the current one), ``base``, ``both`` or ``all``."""

    voices: Voices
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
        if self.voices.asking().single:
            self.turns.clear()
        self.turns.append({"role": "user", "content": text})
        answers = {}
        for name in (names := self._speakers()):
            if len(names) > 1:
                plain = len(self.voices.known) == 1 and name != "base"
                self.write(f"[{'adapter' if plain else name}] ")
            answers[name] = self._answer(name)
            self.write("\n")
        kept = answers.get(self.voices.current, answers[names[-1]])
        self.turns.append({"role": "assistant", "content": kept})

    def _speakers(self) -> list[str]:
        """Who answers, by name."""
        current = self.voices.current
        return {"base": ["base"], "adapter": [current], "both": ["base", current]}.get(
            self.who, ["base", *self.voices.known]
        )

    def _answer(self, name: str) -> str:
        from veneer.cli.generation import stream

        loaded = self.voices.loaded
        with self.voices.speaking(name) as asking:
            return stream(
                loaded.model, loaded.tokenizer, self.messages(), self.sampling, self.write, chat=asking.chat
            )  # fmt: skip

    def command(self, line: str) -> bool:
        """Obey a line that begins with a slash; False when it asks to leave."""
        name, _, rest = line[1:].partition(" ")
        if name in {"quit", "exit", "q"}:
            return False
        if name in {"base", "adapter", "both", "all", "adapters", "load"} and not self.voices.known and name != "base":
            self.write("there is no adapter here: this is a base model\n")
        elif name in {"base", "both", "all"} or (name == "adapter" and not rest.strip()):
            self.who = name
            self.write(f"answers: {name}\n")
        elif name in {"adapter", "load"}:
            self._switch(name, rest.strip())
        elif name == "adapters":
            self.write("".join(f"{'*' if own == self.voices.current else ' '} {own}\n" for own in self.voices.known))
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

    def _switch(self, how: str, what: str) -> None:
        """Answer with another adapter, by its name or, to `load`, by its folder."""
        if how == "load":
            try:
                what = self.voices.add(what)
            except (UserError, AdapterError, RecipeError) as error:
                hint = f". {error.hint}" if isinstance(error, UserError) and error.hint else ""
                self.write(f"not loaded: {error}{hint}\n")
                return
        if what not in self.voices.known:
            self.write(f"no adapter {what!r}; there are {', '.join(self.voices.known)}\n")
            return
        asked, self.voices.current, self.who = self.voices.asking(), what, "adapter"
        if asked.system != self.voices.asking().system and self.system == asked.system:
            self.system = self.voices.asking().system
        self.write(f"answers: {what}\n")


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
    beside: Annotated[
        list[str] | None, typer.Option("--with", help="Another adapter of the same base to switch to; may be repeated.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this and leave.")] = None,
    system: System = None,
    who: Annotated[str, typer.Option("--answer-with", help="adapter, base, both or all.")] = "adapter",
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    debug: DebugFlag = False,
) -> None:
    """Talk to a tuned model in the terminal; in a script, --prompt or a pipe of lines."""
    if who not in {"adapter", "base", "both", "all"}:
        raise UserError(
            f"--answer-with {who!r} is none of adapter, base, both, all", hint="Leave it out for the adapter."
        )
    loaded = _load(model, base)
    from veneer.cli.generation import Sampling

    voices = Voices(loaded)
    for other in beside or ():
        voices.add(other, base)
    talk = Conversation(
        voices=voices,
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
