"""The commands of `cllm` and their options, as the parser of the command line sees them."""

from cllm.cli.app import parser


def _commands(group, path=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(_commands(parser()))


def options(*command):
    """The options of a command by how they are written."""
    return {name: each for each in COMMANDS[command].params if each.param_type_name == "option" for name in each.opts}
