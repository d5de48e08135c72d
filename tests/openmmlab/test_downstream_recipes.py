import mmengine
import pytest
from downstream_runs import RECIPES, ROOT, need, scope, train_tool
from mmengine.optim import build_optim_wrapper

from hgkd.openmmlab.config import drop_downloads, model_config

need("mmdet", "mmseg")


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_builds_its_model_and_optimiser(recipe, monkeypatch):
    def no_download(*args, **kwargs):
        raise AssertionError("a recipe must not fetch anything")

    monkeypatch.setattr(mmengine.runner.checkpoint, "load_from_http", no_download)
    cfg = train_tool.load_config(ROOT / recipe)
    assert cfg.runner_type == "hgkd.DownstreamRunner"
    assert cfg.backbone is None
    distilled = cfg.model.type == "hgkd.FeatureDistiller"
    assert distilled == ("mgd_" in recipe or "g2sd_" in recipe)
    if distilled:
        cfg.model.allow_random_teacher = True
        for part in ("student", "teacher"):
            cfg.model[part] = model_config(cfg.model[part])
    drop_downloads(cfg.model)
    with scope(cfg.default_scope):
        from mmengine.registry import MODELS

        model = MODELS.build(cfg.model)
        optimiser = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in optimiser.param_groups for p in group["params"] if p.requires_grad} == trained
    rates = {group["lr"] for group in optimiser.param_groups}
    assert (len(rates) > 1) == ("convnext" in recipe)
