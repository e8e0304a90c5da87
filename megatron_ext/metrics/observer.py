"""A sink that shows every step to the run's course, which may decide lengths from it."""

from megatron_ext.curriculum.course import Course
from megatron_ext.metrics.records import EvalRecord, EventRecord, TrainRecord


class CourseObserver:
    """Passes loss and variance of each step on; there is one, on the rank that decides."""

    def __init__(self, course: Course) -> None:
        self._course = course

    def train(self, record: TrainRecord) -> None:
        """Show a step."""
        self._course.observe(seq_len=record.seq_len, loss=record.loss, variance=record.adam_var_max)

    def evaluation(self, record: EvalRecord) -> None:
        """Validations decide nothing: how often a run validates must not change its weights."""

    def event(self, record: EventRecord) -> None:
        """Events decide nothing."""

    def roll_back(self, *, step: int, tokens: int) -> None:
        """The course goes back by a state of its own."""

    def close(self) -> None:
        """Nothing is kept."""
