"""A runner that works in the process of the test."""

from cllm.data.preparation.worker import call


class Here:
    """Runs tasks one after the other; `ran` names them."""

    def __init__(self):
        self.ran = []

    def run(self, function, arguments, heard=None):
        for number, each in enumerate(arguments):
            self.ran.append(function.partition(":")[2])
            yield number, call(function, each)

    def close(self):
        pass
