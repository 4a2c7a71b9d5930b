"""numba's compiler, made to optimise and translate a kernel once: together with all functions that it calls, and these not by themselves as well.

numba optimises every function that it compiles and makes machine code of it, also one that only other functions call, whose code is then linked
into each of them and optimised there again. Here a function that Python cannot call (`no_cpython_wrapper`, `no_cfunc_wrapper`) is only linked, and
lies in the cache as LLVM's code.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

LINKED = "linked"  # the kind of a cached function that is no more than linked


def is_known(version: tuple[int, ...]) -> bool:
    """Whether numba's compiler is built as it is changed here. Other versions compile every function by itself, which takes twice as long."""
    return (0, 64) <= version[:2] <= (0, 68)


def prepare() -> None:
    """Changes how numba makes code, in the versions that are known; to be called once, before the first function is compiled."""
    import numba

    if not is_known(numba.version_info.full):
        return
    import llvmlite.binding as llvm
    from numba.core import codegen, cpu
    from numba.core.environment import lookup_environment

    make_function: Any = import_module("numba._dynfunc").make_function

    library_class: Any = codegen.JITCodeLibrary
    context_class: Any = cpu.CPUContext
    codegen_class: Any = codegen.JITCPUCodegen
    finalize, get_executable, set_env = library_class.finalize, context_class.get_executable, codegen_class.set_env
    serialize, unserialize = library_class.serialize_using_object_code, library_class._unserialize.__func__

    def link(self: Any) -> None:
        """What a library calls becomes a part of it; nothing can be added afterwards."""
        if self._finalized or getattr(self, "_linked", False):
            return
        for library in dict.fromkeys(self._linking_libraries):
            self._reload_init.update(library._reload_init)
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._linking_libraries = []
        self._finalize_dynamic_globals()
        self._linked = True

    def has_dynamic_globals(self: Any) -> bool:
        link(self)
        return bool(self._dynamic_globals)

    def finalize_linked(self: Any) -> None:
        link(self)
        self._dynamic_globals = []  # which are found again
        finalize(self)

    def module_for_linking(self: Any) -> Any:
        link(self)
        if self._shared_module is None:
            self._shared_module = self._final_module.clone()
            for function in self._shared_module.functions:
                if not function.is_declaration and function.linkage == llvm.Linkage.external:
                    function.linkage = "linkonce_odr"
        return self._shared_module

    def add_linking_library(self: Any, library: Any) -> None:
        link(library)
        self._linking_libraries.append(library)

    def is_called_from_outside(library: Any, fndesc: Any) -> bool:
        wrappers = {fndesc.llvm_cpython_wrapper_name, fndesc.llvm_cfunc_wrapper_name}
        module = library._final_module if library._shared_module is None else library._shared_module
        return any(each.name in wrappers for each in module.functions if not each.is_declaration)

    def executable(self: Any, library: Any, fndesc: Any, env: Any) -> Any:
        if is_called_from_outside(library, fndesc):
            made = get_executable(self, library, fndesc, env)
            for each in library._final_module.global_variables:  # of the functions that were linked in
                if (found := lookup_environment(each.name)) is not None:
                    library.codegen.set_env(each.name, found)
            return made
        library.is_only_linked = True
        return make_function(fndesc.lookup_module(), fndesc.qualname.split(".")[-1], fndesc.qualname, 0, env, (library,))

    def set_known_env(self: Any, env_name: str, env: Any) -> None:
        if self._engine.is_symbol_defined(env_name):
            set_env(self, env_name, env)

    def serialize_linked(self: Any) -> tuple[str, str, Any]:
        if getattr(self, "is_only_linked", False):
            return self.name, LINKED, self._get_module_for_linking().as_bitcode()
        found: tuple[str, str, Any] = serialize(self)
        return found

    def unserialize_linked(cls: Any, codegen: Any, state: tuple[str, str, Any]) -> Any:
        name, kind, data = state
        if kind != LINKED:
            return unserialize(cls, codegen, state)
        self = codegen.create_library(name)
        self._final_module = self._shared_module = llvm.parse_bitcode(data)
        self._linked = self.is_only_linked = True
        self._finalize_dynamic_globals()
        return self

    library_class.finalize = finalize_linked
    library_class.has_dynamic_globals = property(has_dynamic_globals)
    library_class._get_module_for_linking = module_for_linking
    library_class.add_linking_library = add_linking_library
    library_class.serialize_using_object_code = serialize_linked
    library_class._unserialize = classmethod(unserialize_linked)
    codegen_class.set_env = set_known_env
    context_class.get_executable = executable
