"""The kinds of instructions of a compiled program."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TEXT = """HloModule jit_round

FunctionNames
1 "sgd"
2 "_heads_first"
3 "times"
4 "head"
5 "norm"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1}
2 {file_name_id=1 function_name_id=2 line=2}
3 {file_name_id=1 function_name_id=3 line=3}
4 {file_name_id=1 function_name_id=4 line=4}
5 {file_name_id=1 function_name_id=5 line=5}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=2}
4 {file_location_id=4 parent_frame_id=2}
5 {file_location_id=3 parent_frame_id=5}
6 {file_location_id=5 parent_frame_id=2}

%body.1 (p.1: f32[2,2]) -> f32[2,2] {
  %p.1 = f32[2,2]{1,0} parameter(0)
  ROOT %dot.1 = f32[2,2]{1,0} dot(%p.1, %p.1), metadata={stack_frame_id=3}
}

%body.2 (p.2: f32[2,2]) -> f32[2,2] {
  %p.2 = f32[2,2]{1,0} parameter(0)
  ROOT %copy.2 = f32[2,2]{0,1} copy(%p.2), metadata={stack_frame_id=2}
}

ENTRY %main (x: f32[2,2]) -> f32[2,2] {
  %x = f32[2,2]{1,0} parameter(0)
  %ynn_fusion.1 = f32[2,2]{1,0} fusion(%x), kind=kCustom, calls=%body.1
  %dot.3 = f32[2,2]{1,0} dot(%x, %x), metadata={stack_frame_id=2}
  %dot.4 = f32[2,2]{1,0} dot(%x, %x), metadata={stack_frame_id=5}
  %fusion.2 = f32[2,2]{0,1} fusion(%x), kind=kLoop, calls=%body.2
  %exp.1 = f32[2,2]{1,0} exponential(%x), metadata={stack_frame_id=2}
  ROOT %add.1 = f32[2,2]{1,0} add(%x, %x), metadata={stack_frame_id=6}
}
"""


@pytest.mark.parametrize(
  ('name', 'kind'),
  [
    ('ynn_fusion.1', 'products with weights and factors'),
    ('dot.3', 'products of attention'),
    ('dot.4', 'products of logits'),  # `times`, called by `head`
    ('fusion.2', 'copies'),
    ('exp.1', 'attention, elementwise'),
    ('add.1', 'norms, elementwise'),
  ],
)
def test_an_instruction_has_the_kind_of_its_work(monkeypatch, name, kind):
  monkeypatch.syspath_prepend(str(ROOT / 'scripts' / 'benchmarks'))
  monkeypatch.delitem(sys.modules, 'kinds', raising=False)
  import kinds  # pyright: ignore[reportMissingImports]

  assert kinds.kind(kinds.instructions(TEXT)[name]) == kind
