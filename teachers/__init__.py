"""Teachers: networks and classical models that only run forward."""

from teachers.base import Teacher, TeacherSpec
from teachers.registry import TEACHERS, build

__all__ = ["TEACHERS", "Teacher", "TeacherSpec", "build"]
