"""Lets Triton's interpreter prepare triton.language once a launch and module, not at every call of a jit function."""


def prepare_once() -> None:
    """Shortens a call of one jit function by another whose module's view of the language has been prepared.

    Half of the kernel tests' time went there. The results are the same: the preparation depends on that view alone.
    """
    try:
        from triton.runtime.interpreter import GridExecutor, InterpretedFunction
    except ModuleNotFoundError:
        return
    launch, call = GridExecutor.__call__, InterpretedFunction.__call__
    prepared = set()

    def launched(self, *args, **kwargs):
        prepared.clear()
        return launch(self, *args, **kwargs)

    def called(self, *args, **kwargs):
        module = id(self.fn.__globals__)
        if module in prepared:
            return self.rewrite()(*args, **kwargs)
        prepared.add(module)
        return call(self, *args, **kwargs)

    GridExecutor.__call__, InterpretedFunction.__call__ = launched, called
