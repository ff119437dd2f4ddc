"""Two models that are asked the same, side by side, in a terminal."""

from tasft.cli.chat.sides import Side, sides_of
from tasft.cli.chat.talk import Talk, Turn
from tasft.cli.chat.terminal import talk_in_terminal

__all__ = ["Side", "Talk", "Turn", "sides_of", "talk_in_terminal"]
