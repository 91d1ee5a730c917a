"""The pack's nodes, in the order in which a graph uses them."""

from .apply import ApplyAnyStory
from .build import BuildAnyStory
from .build_flux import BuildAnyStoryFlux
from .encode import AnyStorySubjectOptions, EncodeSubject
from .load import LoadAnyStory
from .masks import AnyStorySplitMasks
from .mini import LoadAnyStoryMini
from .preview import RoutingMapPreview
from .route import SubjectRouter
from .segment import AnyStorySegment
from .story import AnyStoryPanels
from .subject_files import LoadAnyStorySubject, SaveAnyStorySubject

NODES = (
    LoadAnyStoryMini,
    LoadAnyStory,
    EncodeSubject,
    AnyStorySubjectOptions,
    AnyStorySplitMasks,
    SubjectRouter,
    ApplyAnyStory,
    RoutingMapPreview,
    AnyStorySegment,
    SaveAnyStorySubject,
    LoadAnyStorySubject,
    AnyStoryPanels,
    BuildAnyStory,
    BuildAnyStoryFlux,
)
