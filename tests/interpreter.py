"""Makes Triton's interpreter take half of its time, with the same results."""

import dataclasses


def hasten() -> None:
    """Prepares triton.language once a launch and module, looks up no overflow of integers, and each numpy dtype once.

    The preparation, which the interpreter makes at every call of a jit function, depends on the module's view of the
    language alone. Its search for overflow doubles every integer sum in int64; offsets beyond 32 bits have a test.
    """
    try:
        from triton.runtime import interpreter
        from triton.runtime.interpreter import GridExecutor, InterpretedFunction
    except ModuleNotFoundError:
        return
    launch, call, np_dtype = GridExecutor.__call__, InterpretedFunction.__call__, interpreter._get_np_dtype
    prepared, dtypes = set(), {}

    def launched(self, *args, **kwargs):
        prepared.clear()
        return launch(self, *args, **kwargs)

    def called(self, *args, **kwargs):
        module = id(self.fn.__globals__)
        if module in prepared:
            return self.rewrite()(*args, **kwargs)
        prepared.add(module)
        return call(self, *args, **kwargs)

    def looked_up(dtype):
        name = str(dtype)
        if name not in dtypes:
            dtypes[name] = np_dtype(dtype)
        return dtypes[name]

    GridExecutor.__call__, InterpretedFunction.__call__ = launched, called
    interpreter._get_np_dtype = looked_up
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
