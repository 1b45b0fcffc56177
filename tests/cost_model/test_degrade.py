import pytest
import torch

from lit_safety.core.errors import UserError
from lit_safety.cost_model.degrade import Degradation

IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_view_is_a_function_of_key_and_number_alone():
    worn = Degradation()
    together = worn(IMAGES, ["a", "b", "a"], [1, 2, 1])
    alone = worn(IMAGES[1:2], ["b"], [2])
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(worn(IMAGES[:1], ["a"], [1]), worn(IMAGES[:1], ["a"], [2]))
    assert not torch.equal(worn(IMAGES[:1], ["a"], [1]), worn(IMAGES[:1], ["b"], [1]))


def test_both_images_of_a_pair_are_degraded_alike():
    """Without blur a view is c x + n with the same c and n for both: the difference of two images is scaled by c."""
    worn = Degradation(blur=1.0, noise=0.05)
    grey, light = torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.2)
    difference = worn(light, ["a"], [3]) - worn(grey, ["a"], [3])
    assert difference.std() < 1e-6
    assert difference.mean() / 0.2 == pytest.approx(1, abs=0.15)


def test_view_0_is_the_image_and_the_others_stay_in_range():
    worn = Degradation(views=4, noise=1.0)
    assert torch.equal(worn(IMAGES, ["a", "b", "c"], [0, 0, 0]), IMAGES)
    views = worn(IMAGES, ["a", "b", "c"], [4, 4, 4])
    assert views.shape == IMAGES.shape
    assert views.abs().max() <= 1
    assert list(worn.all) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("settings", [{"views": -1}, {"blur": 0.5}, {"contrast": 1.0}, {"noise": -0.1}])
def test_impossible_settings_are_refused(settings: dict[str, float]):
    with pytest.raises(UserError, match=r"model\.init_args\.degradation"):
        Degradation(**settings)
