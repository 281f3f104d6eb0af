"""Hooks that a subclass or an instance overrides."""

from oddsmith.training.overrides import is_overridden


class Base:
    def hook(self):
        return 1

    @staticmethod
    def plain():
        return 2


class Other(Base):
    def unrelated(self):
        return 3


class Own(Base):
    def hook(self):
        return 4

    @staticmethod
    def plain():
        return 5


def test_a_subclass_that_overrides():
    for name in ("hook", "plain"):
        assert not is_overridden(Base(), Base, name)
        assert not is_overridden(Other(), Base, name)
        assert is_overridden(Own(), Base, name)


def test_an_instance_that_overrides():
    instance = Base()
    instance.hook = lambda: 6
    assert is_overridden(instance, Base, "hook")
    assert not is_overridden(instance, Base, "plain")


def test_a_hook_of_another_base_class():
    class Mixin:
        def hook(self):
            return 7

    assert is_overridden(type("Mixed", (Mixin, Base), {})(), Base, "hook")
    assert not is_overridden(type("Behind", (Base, Mixin), {})(), Base, "hook")
