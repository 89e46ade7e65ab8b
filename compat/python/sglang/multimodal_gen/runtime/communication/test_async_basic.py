"""The transfer layer's self-check at the path that the usage guide gives to torchrun."""

import runpy

if __name__ == "__main__":
    runpy.run_module("ditrelay.runtime.communication.test_async_basic", run_name="__main__", alter_sys=True)
