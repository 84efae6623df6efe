"""The table of model families by transformers' `model_type`, and those that it does not have."""

from jtl.models import bert, mlp, resnet, vit
from jtl.models.backbone import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (bert.FAMILY, vit.FAMILY, resnet.FAMILY)
}
OWN: dict[str, Family] = {family.model_type: family for family in (mlp.FAMILY,)}
