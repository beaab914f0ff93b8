"""A pytest plugin (`-p amx_emulated`) that loads the library named by INTERNLM2_TEST_LIBRARY in place of the package's own."""

import importlib.util
import os
import sys


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "internlm2_kernels._C":
            return importlib.util.spec_from_file_location(name, os.environ["INTERNLM2_TEST_LIBRARY"])
        return None


sys.meta_path.insert(0, Finder)
