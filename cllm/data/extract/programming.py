"""The language that source code is written in: told by its name, by the interpreter that its first line names, and by its content where an extension
is used by several languages."""

import re

# The name of a language, and the extensions, the names of files or the interpreters that tell of it.
_EXTENSIONS = """
    ada .adb .ads | agda .agda | assembly .asm .s | awk .awk | bash .bash | batch .bat .cmd | bibtex .bib | c .c .h
    clojure .clj .cljs .cljc .edn | cmake .cmake | cobol .cob .cbl | coffeescript .coffee | common-lisp .lisp .lsp .cl
    cpp .cc .cpp .cxx .c++ .hh .hpp .hxx .h++ .ipp .tpp .inl | crystal .cr | csharp .cs .csx | css .css | cuda .cu .cuh | cython .pyx .pxd .pxi
    d .d | dart .dart | diff .diff .patch | dockerfile .dockerfile | elixir .ex .exs | elm .elm | emacs-lisp .el | erlang .erl .hrl | fish .fish
    fortran .f .for .f77 .f90 .f95 .f03 .f08 | fsharp .fs .fsi .fsx | gdscript .gd | glsl .glsl .vert .frag .comp | go .go | gradle .gradle
    graphql .graphql .gql | groovy .groovy | haskell .hs .lhs | haxe .hx | hcl .hcl .tf .tfvars | hlsl .hlsl | idris .idr
    ini .ini .cfg .conf .properties | java .java | javascript .js .mjs .cjs .jsx | julia .jl | kotlin .kt .kts | lean .lean | less .less
    llvm .ll | lua .lua | makefile .mk .mak | matlab .mlx | meson .meson | metal .metal | mlir .mlir | nim .nim .nims | nix .nix
    objective-c .m .mm | ocaml .ml .mli .mll .mly | opencl .clh | pascal .pas .pp .dpr .lpr | perl .pl .pm .t | php .php .phtml .php3 .php5
    postscript .ps | powershell .ps1 .psm1 .psd1 | prolog .pro .prolog | protobuf .proto | python .py .pyi .pyw | qml .qml | r .r | racket .rkt
    ruby .rb .rake .gemspec | rust .rs | sass .sass .scss | scala .scala .sc .sbt | scheme .scm .ss .sld | shell .sh .zsh .ksh | smalltalk .st
    solidity .sol | sql .sql .psql .ddl | standard-ml .sml .sig .fun | starlark .bzl .star | svelte .svelte | swift .swift
    systemverilog .sv .svh | tcl .tcl .tk | terra .t2 | tex .sty .cls .dtx .ins | thrift .thrift | toml .toml | triton .ttir
    typescript .ts .tsx .mts .cts | vala .vala .vapi | vbnet .vb .vbs .bas | verilog .v .vh | vhdl .vhd .vhdl | vim-script .vim | vue .vue
    wgsl .wgsl | xml .xml .xsd .xsl .xslt .svg .wsdl | yaml .yaml .yml | zig .zig
"""
_NAMES = """
    makefile makefile gnumakefile kbuild | dockerfile dockerfile containerfile | cmake cmakelists.txt | meson meson.build
    ruby rakefile gemfile vagrantfile | groovy jenkinsfile | starlark build build.bazel workspace | python sconstruct sconscript | kconfig kconfig
    m4 configure.ac | bash pkgbuild
"""
_INTERPRETERS = """
    python python pypy | shell sh dash ksh zsh | bash bash | fish fish | perl perl | ruby ruby | javascript node | typescript deno bun | lua lua
    php php | r rscript | tcl tclsh wish | awk awk gawk mawk | makefile make | julia julia | elixir elixir | erlang escript | haskell runhaskell
    groovy groovy | scala scala | swift swift | ocaml ocaml | racket racket | scheme guile | emacs-lisp emacs | powershell pwsh
"""


def _table(text: str) -> dict[str, str]:
    groups = [group.split() for group in text.replace("\n", "|").split("|") if group.strip()]
    return {sign: language for language, *signs in groups for sign in signs}


BY_EXTENSION, _BY_NAME, _BY_INTERPRETER = _table(_EXTENSIONS), _table(_NAMES), _table(_INTERPRETERS)
_SHEBANG = re.compile(r"#![ \t]*(?:\S*/)?(?:env[ \t]+(?:-S[ \t]*)?(?:[A-Za-z_]+=\S*[ \t]+)*)?([A-Za-z]+)")
# Extensions that several languages use: the first pattern that is found decides, and the language of the extension where none is.
_AMBIGUOUS = {
    ".h": (
        ("objective-c", r"^\s*(?:@interface|@protocol|@class|@property|#import)\b"),
        ("cpp", r"^\s*(?:class|namespace|template|using|public:|private:|protected:)\b[^;]*[{;:<]|\bstd::|\bconstexpr\b"),
    ),
    ".m": (("objective-c", r"^\s*(?:@\w+|#import|#include)\b"), ("matlab", r"^\s*(?:function\b|%|end\s*;?\s*$)|^\s*\w+\s*=.*;\s*$")),
    ".pl": (("prolog", r"^\s*:-|^[a-z]\w*\(.*\)\s*(?::-|\.\s*$)"),),
    ".t": (("perl", r"^\s*(?:use|my|sub)\b"),),
    ".v": (("coq", r"^\s*(?:Require|Theorem|Lemma|Definition|Inductive|Proof)\b"),),
    ".fs": (("glsl", r"^\s*#version|\bgl_FragColor\b"),),
    ".cl": (("opencl", r"__kernel|\b__global\b"),),
    ".d": (("makefile", r"\A\S+\.o\s*:"),),
    ".pro": (("qmake", r"^\s*(?:QT|TEMPLATE|SOURCES|HEADERS)\s*\+?="),),
    ".pp": (("puppet", r"^\s*(?:class|node|define)\s+[\w:'\"]+\s*(?:\(|\{|inherits)"),),
    ".ts": (("xml", r"\A\s*<\?xml|\A\s*<!DOCTYPE TS"),),
    ".cls": (("apex", r"^\s*(?:public|global|private)\s+.*class\b"), ("vbnet", r"\AVERSION \d")),
    ".r": (("rebol", r"\A\s*REBOL\b"),),
}  # fmt: skip
_CHECKED = {
    extension: [(language, re.compile(pattern, re.MULTILINE)) for language, pattern in rules] for extension, rules in _AMBIGUOUS.items() if rules
}


def language_of(name: str, start: str) -> str:
    """The programming language of a file, or of its data format; empty for a text that is neither. `start`: how it begins."""
    base = name.rpartition("/")[2].lower()
    if base in _BY_NAME:
        return _BY_NAME[base]
    stem, dot, ending = base.rpartition(".")
    extension = f".{ending}" if dot and stem else ""
    if extension in _CHECKED:
        language = next((language for language, pattern in _CHECKED[extension] if pattern.search(start)), "")
        return language or BY_EXTENSION.get(extension, "")
    if extension in BY_EXTENSION:
        return BY_EXTENSION[extension]
    shebang = _SHEBANG.match(start)
    if shebang and extension in ("", ".in", ".cgi", ".command"):
        return _BY_INTERPRETER.get(shebang[1].lower(), "")
    return ""
