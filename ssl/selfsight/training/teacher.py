"""The exponential moving average that a teacher is: teacher ← m·teacher + (1 − m)·student, in fp32, parameters only.

A bf16 average would stall: with m = 0.996 the increments fall below half a unit in the last place and are lost. Under
ZeRO-3 each rank averages the stretches that it holds, which are cut alike in student and teacher: nothing is sent.
"""

import torch
from torch import Tensor, nn

from selfsight.collective import own_part


class Teacher:
    """Follows the (student, teacher) module pairs of an objective; with no pairs it does nothing."""

    def __init__(self, pairs: list[tuple[nn.Module, nn.Module]]) -> None:
        self.student: list[Tensor] = []
        self.teacher: list[Tensor] = []
        for student, teacher in pairs:
            theirs = dict(teacher.named_parameters())
            mine = dict(student.named_parameters())
            assert mine.keys() == theirs.keys(), f"student and teacher differ in {mine.keys() ^ theirs.keys()}"
            for name, parameter in mine.items():
                assert theirs[name].dtype == torch.float32, f"the teacher's {name} is not fp32"
                assert not theirs[name].requires_grad, f"the teacher's {name} would be trained"
                self.student.append(parameter)
                self.teacher.append(theirs[name])

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """One step of the average, for after the optimiser has really moved."""
        if self.teacher:
            student, teacher = [own_part(p) for p in self.student], [own_part(p) for p in self.teacher]
            torch._foreach_lerp_(teacher, student, 1.0 - momentum)  # pyright: ignore[reportPrivateImportUsage]
