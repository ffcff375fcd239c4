"""Asks for texts and continues them, on a terminal or for a program; with --chat, a conversation."""

import sys

from kqv.errors import UserError, warn
from kqv.generation.printing import SEPARATOR, opening, print_pieces, print_samples
from kqv.generation.prompts import completed, decode_utf8, encode_prompt, fitted, room_for_answer
from kqv.values import as_utf8


class Conversation:
    """
    Texts that a user types and that a Writer continues, one after another. With --chat each follows on the
    messages before it.
    """

    def __init__(self, writer):
        self.writer, self.config = writer, writer.config
        self.history = []  # [(role, text), ...], the user's and the assistant's in turn; empty without --chat
        self.turn = 0  # how many texts were typed

    def run(self):
        """Ask until standard input ends."""
        if sys.stdin.isatty():
            self.run_on_terminal()
        else:
            self.run_for_program()

    def run_for_program(self):
        """Answer each line of standard input; print only answers. Raises UserError at the first error."""
        for number, line in enumerate(sys.stdin.buffer, 1):
            text = decode_utf8(line, f"message {number} of standard input")
            self.reply(*self.read(text.removesuffix("\n").removesuffix("\r")))

    def run_on_terminal(self):
        """Ask for a text and continue it, again and again. Ctrl-C ends a text, Ctrl-D the program."""
        try:
            import readline  # noqa: F401  gives input() its history and line editing
        except ImportError:
            pass
        is_chat = self.writer.tokenizer.kind == "chat"
        hint = "Say something, and it is answered" if is_chat else "Begin a text, and it is continued"
        print(f"{hint}. Ctrl-C stops it; Ctrl-D ends the program.")
        while True:
            try:
                try:
                    text, prompt = self.read(as_utf8(input("> ")))
                except (UserError, UnicodeDecodeError) as error:
                    warn(str(error))
                else:
                    self.reply(text, prompt)
            except KeyboardInterrupt:
                print()
            except EOFError:
                print()
                return

    def read(self, text):
        """(text to continue, its ids) where the user typed `text`. Raises UserError without any ids."""
        self.turn += 1
        text = completed(text, self.writer.tokenizer)
        return text, self.prompt(text)

    def reply(self, text, prompt):
        """Print the continuations of a text with these ids."""
        config, number = self.config, self.turn - 1
        start = opening(text, self.writer.tokenizer)
        if config.beams and config.num_samples > 1:
            print_samples([start], self.writer.records([prompt]), config.raw)
            return
        for copy in range(config.num_samples):
            said = []
            try:
                pieces = self.writer.pieces(prompt, (number, copy))
                print_pieces(start, remembered(pieces, said), config.raw)
            finally:  # an answer that Ctrl-C stopped is remembered as far as it was printed
                if config.chat:
                    answer = self.writer.tokenizer.message_of("".join(said))
                    self.history += [("user", text), ("assistant", answer)]
            if config.num_samples > 1:
                print(SEPARATOR)

    def prompt(self, text):
        """
        The ids of the history and the text. Where they leave no room for an answer, the oldest exchanges are
        dropped from the history.
        """
        block_size = self.writer.engine.gpt.config.block_size
        longest = block_size - room_for_answer(self.config, block_size)
        for first in range(0, len(self.history) + 1, 2):  # of the messages that are kept
            prompt = encode_prompt(text, self.writer.tokenizer, self.config, self.history[first:])
            if len(prompt) <= longest:
                break
        (prompt,) = fitted([text], [prompt], self.writer.tokenizer, self.config, block_size)
        del self.history[:first]
        return prompt


def remembered(pieces, said):
    """Pass the pieces on, and append each to the list `said`."""
    for piece in pieces:
        said.append(piece)
        yield piece
