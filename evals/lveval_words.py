"""Which words LV-Eval's keyword recall leaves out, as digests.

The lists are upstream's (infinigence/LVEval 63e7ae9, `metrics.py`); their text is not copied here.
A word is on a list iff the first 12 hexadecimal digits of its SHA-256 are.
"""

import functools
import hashlib

_ENGLISH = (
    "0695b563acde10c22bcf4c76151e58a8313015eaa75240ae193c45b528191eb79602411e28391d3bc64e"
    "2ad8a7049d7c2cda85e504e1354cbfc81426372f7e2fd2d046599c5bb5c3582967534d0f6201111b83a0"
    "663ea1bfffe56ed0337140bd7175517a370b73c9c98668a3749ab2c0d06c75857a45899977bc06c55d29"
    "85574fa07dae8e7fc0236af4910adfb424649150c74c5f92961eb4369973a4262e1c9bcba511aeeeb8a1"
    "a7e2d26e8d15b1d6b91b67c2b63b99f6383bb8d31e852725ba78973ddcf9cdc299378871e02a753f0c06"
    "f4bf9f7fcbedfa51fd49abf6fd963e4fd459"
)

_CHINESE = (
    "01dd96a3885b04e45efb3be8053c111a2b0408e2725ce12009680c3fbe7a0c806d3c78180d1785e1f368"
    "0ef5c86fab9412404a0b63811625179badc01e9f2561b7cf1f863793c6f022c95798a93223e89ba0a143"
    "2719a8ea304b2e7d2c03a9502f4b6032adda385a845b60943a116815bc9d3d7114281f5b3fc5b79e6d29"
    "413c06bcef7c43991cbbf5ea484d556139104fb249b9d7ac50037f6b805458ee5c180e115b77181bd648"
    "5b7bbecff8605ba1e3c0eb635ccd91f4181d60be66d6158662ef900a8f5d658605835bfc65edbf9f1c67"
    "6740a5374c756a7339bb75976d8229118caa6e55fb9d8a3d708712e5812374570c72706a75527e5b5cba"
    "760aa16810477d58b6422cac7f77f23af7b085217f7aff7788731a8fb9d88af2350cfd658db71ed28b0f"
    "8ee12e2310d990ce0f66f09493a2d318bf929523358742c7975f35218ed89a8d951dcb60a0c7716669b5"
    "a2123d69506fa52347710877a567bdaa1136a57fbc7663a1a70a4587c393a850d56fa243ad3757440409"
    "b02dfe2160c6b2dd27e84f07b5141d3d19e9b56f36b529dbb67e10d01952b8e9510f5283b9bef45c39d8"
    "bcf21a24c89fbdbd41e490e2c82e0431b4e5ca4f5ee82e28cdfd0b34e491d2909f1647e7db5ba671d244"
    "de1d5dd076fbe24a9725df82e6a20027a916ec46c055ab6bf004f1d84cf9f60cdf6e705cf9376c98b6cb"
    "fd5db2cf36a9"
)


def _cut(digests: str) -> frozenset[str]:
    return frozenset(digests[i : i + 12] for i in range(0, len(digests), 12))


_ON_LIST = {False: _cut(_ENGLISH), True: _cut(_CHINESE)}


@functools.lru_cache(maxsize=65536)
def _digest(word: str) -> str:
    return hashlib.sha256(word.encode()).hexdigest()[:12]


def is_left_out(word: str, *, chinese: bool) -> bool:
    """Whether upstream's list for the language has the word."""
    return _digest(word) in _ON_LIST[chinese]
