"""What builds an artefact beside its C++: the assembly that holds the weights, and CMakeLists.txt."""

from __future__ import annotations

from collections.abc import Sequence

from skive.plan import Plan


def weights_unit(name: str) -> str:
    """Assembly that places the packed weights in read-only data without a compiler parsing them."""
    return (
        f"/* The packed weights of {name}, from {name}_weights.bin. Generated; do not edit. */\n"
        "#if defined(__APPLE__)\n#define SYMBOL(name) _##name\n    .const\n#else\n#define SYMBOL(name) name\n"
        '    .section .rodata,"a",%progbits\n#endif\n'
        f"    .globl SYMBOL({name}_weights)\n"
        "#if !defined(__APPLE__)\n"
        f"    .hidden SYMBOL({name}_weights)\n"
        "#endif\n    .balign 64\n"
        f'SYMBOL({name}_weights):\n    .incbin "{name}_weights.bin"\n    .byte 0\n'
        '#if defined(__ELF__)\n    .section .note.GNU-stack,"",%progbits\n#endif\n'
    )


def cmake(plan: Plan, flags: Sequence[str], units: Sequence[str]) -> str:
    """CMakeLists.txt of the artefact, whose `units` are compiled with `flags`."""
    n = plan.name
    options, sources = " ".join(flags), "\n  ".join(units)
    threads = (
        f"find_package(Threads REQUIRED)\ntarget_link_libraries({n} PRIVATE Threads::Threads)\n"
        if plan.threads > 1
        else ""
    )
    return (
        f"# Builds {n} from this folder alone. Generated; do not edit.\n"
        f"cmake_minimum_required(VERSION 3.13)\nproject({n} LANGUAGES CXX ASM)\n\n"
        f'option(BUILD_SHARED_LIBS "Build lib{n}.so instead of lib{n}.a" ON)\n'
        f"add_library({n}\n  {sources})\n"
        f"target_include_directories({n} INTERFACE ${{CMAKE_CURRENT_SOURCE_DIR}})\n"
        f"target_compile_features({n} PRIVATE cxx_std_17)\n"
        f'separate_arguments(options UNIX_COMMAND "{options}")\n'
        f"target_compile_options({n} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:${{options}}>)\n"
        f"target_compile_options({n} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-iquote${{CMAKE_CURRENT_SOURCE_DIR}}>)\n"
        f"set_source_files_properties({n}_weights.S PROPERTIES\n"
        f'  COMPILE_OPTIONS "-Wa,-I,${{CMAKE_CURRENT_SOURCE_DIR}}")\n'
        f"target_link_options({n} PRIVATE -nodefaultlibs)\ntarget_link_libraries({n} PRIVATE m c gcc)\n{threads}"
    )
