"""The table of model families by transformers' `model_type`."""

from jtl.models import bert, resnet, vit
from jtl.models.backbone import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (bert.FAMILY, vit.FAMILY, resnet.FAMILY)
}
