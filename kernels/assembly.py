"""What the PTX and the SASS of a kernel tell of mistakes that no compiler reports: the order of barriers, registers, overlap, the width of products.

Text in the order of the instructions is read, not the flow of control. The kernels looked at here are loops without jumps into their middle, and what
belongs together stands together.
"""

import re

_EVENT = re.compile(
    r"\s*(?:@!?%p\d+ )?(?P<event>bar\.sync|barrier\.sync|mbarrier\.arrive\.expect_tx|mbarrier\.arrive|mbarrier\.try_wait"
    r"|wgmma\.wait_group|wgmma\.mma_async|st\.shared|stmatrix|cp\.async\.bulk\.tensor\S*?\.(?:global\.shared|shared\S*\.global)"
    r"|cp\.async\.bulk\.wait_group|fence\.proxy)"
)
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,5}\*/\s+(.*?)\s*;")
_REGISTER = re.compile(r"\bR(\d+)\b")


def unordered_accesses(ptx: str) -> list[str]:
    """Where one thread speaks for a warpgroup without waiting for the others first.

    An arrival at an mbarrier says that all threads are done with a buffer, a copy into shared memory that none reads it any more, a copy out of it
    that all have written: each must follow the group's own barrier. A wait for an mbarrier serves a copy out as well, and so does another copy.
    """
    wrong, before = [], ""
    for line in ptx.splitlines():
        found = _EVENT.match(line)
        if found is None:
            continue
        event = found["event"]
        group = before.startswith(("bar.sync", "barrier.sync"))
        if event == "mbarrier.arrive" and not group:
            wrong.append(f"an arrival at an mbarrier after {before or 'nothing'}")
        elif event.startswith("cp.async.bulk.tensor"):
            out = event.endswith("global.shared")
            if not group and not (out and before.startswith(("mbarrier.try_wait", "cp.async.bulk.tensor"))):
                wrong.append(f"a copy {'out of' if out else 'into'} shared memory after {before or 'nothing'}")
        before = event
    return wrong


def registers_over_limit(sass: str) -> list[str]:
    """Registers that are named behind a `setmaxnreg` which grants fewer; the hardware does not look."""
    used: dict[str, int] = {}
    limit = ""
    for instruction in _instructions(sass):
        if instruction.startswith("USETMAXREG"):
            limit = instruction
        elif limit:
            used[limit] = max(used.get(limit, 0), *map(int, _REGISTER.findall(instruction)), 0)
    return [f"R{most} behind {limit}" for limit, most in used.items() if most >= int(limit.rpartition("0x")[2], 16)]


def local_accesses(sass: str) -> int:
    """Loads and stores of local memory: what of a thread's values was not held in registers."""
    return sum(bool(re.match(r"(?:@!?U?P\d+ )?(LDL|STL)\b", instruction)) for instruction in _instructions(sass))


def exponentials(sass: str) -> tuple[int, int]:
    """(those computed while a group of wgmma is left running, all others): a wait for all but one group begins such a stretch, any wait ends it."""
    beside, alone, running = 0, 0, False
    for instruction in _instructions(sass):
        if "WARPGROUP.DEPBAR" in instruction:
            running = re.search(r"\b0x0\b", instruction) is None
        elif "MUFU.EX2" in instruction:
            beside, alone = beside + running, alone + (not running)
    return beside, alone


def narrowest_wgmma(ptx: str) -> int:
    """The fewest columns that one wgmma of the kernel computes; 0 where it has none."""
    return min(map(int, re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k\d+", ptx)), default=0)


def _instructions(sass: str) -> list[str]:
    return [found[1] for line in sass.splitlines() if (found := _INSTRUCTION.match(line))]
