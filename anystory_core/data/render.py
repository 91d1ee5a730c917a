"""A 3D model seen from several sides, by VTK without a window (EGL or OSMesa, no GPU needed)."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .libraries import library

Light = Literal["studio", "even", "side"]
MODELS = (".glb", ".gltf", ".obj")

_FILL = 0.9  # of the picture that the model's bounding sphere fills
_CAMERA_ANGLE = 30.0


@dataclass(frozen=True)
class Look:
    """How models are shown. ``elevation`` of the camera in degrees; views go once around."""

    views: int
    size: int
    elevation: float
    light: Light


def render(path: str, look: Look) -> list[NDArray[np.uint8]]:
    """Views (size,size,4) uint8 of a glTF, GLB or OBJ file, transparent where nothing is. DataError
    for a file without anything to see."""
    _check_file(path)
    core = library("vtkmodules.vtkRenderingCore", "vtk")
    library("vtkmodules.vtkRenderingOpenGL2", "vtk")
    logger = library("vtkmodules.vtkCommonCore", "vtk").vtkLogger
    logger.SetStderrVerbosity(logger.VERBOSITY_OFF)
    window = core.vtkRenderWindow()
    renderer = core.vtkRenderer()
    window.SetOffScreenRendering(1)
    window.SetAlphaBitPlanes(1)
    window.SetMultiSamples(8)
    window.SetSize(look.size, look.size)
    renderer.SetBackground(0, 0, 0)
    renderer.SetBackgroundAlpha(0)
    window.AddRenderer(renderer)
    importer = _importer(path)
    importer.SetRenderWindow(window)
    importer.Update()
    bounds = np.array(renderer.ComputeVisiblePropBounds())
    if not renderer.GetActors().GetNumberOfItems() or not np.isfinite(bounds).all():
        raise DataError(f"{Path(path).name} holds nothing to see")
    centre, radius = (
        (bounds[::2] + bounds[1::2]) / 2,
        np.linalg.norm(bounds[1::2] - bounds[::2]) / 2,
    )
    if not 0 < radius < 1e30:
        raise DataError(f"{Path(path).name} holds nothing to see")
    camera = core.vtkCamera()
    camera.SetViewAngle(_CAMERA_ANGLE)
    renderer.SetActiveCamera(camera)
    _light(renderer, look.light)
    distance = radius / np.sin(np.deg2rad(_CAMERA_ANGLE / 2)) / _FILL
    views: list[NDArray[np.uint8]] = []
    for number in range(look.views):
        around, up = 2 * np.pi * number / look.views, np.deg2rad(look.elevation)
        towards = np.array((np.sin(around) * np.cos(up), np.sin(up), np.cos(around) * np.cos(up)))
        camera.SetFocalPoint(*centre)
        camera.SetPosition(*(centre + distance * towards))
        camera.SetViewUp(0, 1, 0)  # glTF's, and most OBJ files'
        camera.SetClippingRange(distance - 1.1 * radius, distance + 1.1 * radius)
        window.Render()
        views.append(_read(window, look.size))
    window.Finalize()
    if not any(view[..., 3].any() for view in views):
        raise DataError(f"{Path(path).name} shows nothing from any side")
    return views


def _importer(path: str) -> Any:
    formats = library("vtkmodules.vtkIOImport", "vtk")
    if path.lower().endswith(".obj"):
        importer = formats.vtkOBJImporter()
        materials = Path(path).with_suffix(".mtl")
        if materials.exists():
            importer.SetFileNameMTL(str(materials))
            importer.SetTexturePath(str(materials.parent))
    else:
        importer = formats.vtkGLTFImporter()
    importer.SetFileName(path)
    return importer


def _light(renderer: Any, light: Light) -> None:
    """studio: key, fill and back lights; even: as bright from everywhere; side: one, hard."""
    core = library("vtkmodules.vtkRenderingCore", "vtk")
    renderer.RemoveAllLights()
    renderer.AutomaticLightCreationOff()
    if light == "studio":
        kit = core.vtkLightKit()
        kit.SetKeyLightIntensity(1.6)
        kit.AddLightsToRenderer(renderer)
        return
    places = {
        "even": [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1)],
        "side": [(1, 0.3, 0.3)],
    }[light]
    for place in places:
        lamp = core.vtkLight()
        lamp.SetLightTypeToCameraLight()
        lamp.SetPosition(*place)
        lamp.SetFocalPoint(0, 0, 0)
        lamp.SetIntensity(2.5 if light == "side" else 0.7)
        renderer.AddLight(lamp)


def _read(window: Any, size: int) -> NDArray[np.uint8]:
    """What was drawn, (size,size,4), with colours that do not darken towards the edge."""
    core = library("vtkmodules.vtkRenderingCore", "vtk")
    to_numpy = library("vtkmodules.util.numpy_support", "vtk").vtk_to_numpy
    reader = core.vtkWindowToImageFilter()
    reader.SetInput(window)
    reader.SetInputBufferTypeToRGBA()
    reader.ReadFrontBufferOff()
    reader.ShouldRerenderOff()
    reader.Update()
    pixels = to_numpy(reader.GetOutput().GetPointData().GetScalars())
    drawn = pixels.reshape(size, size, 4)[::-1].astype(np.float32)
    colour = drawn[..., :3] * (255 / np.maximum(drawn[..., 3:], 1))
    both = np.concatenate((colour.clip(0, 255), drawn[..., 3:]), axis=2)
    return both.round().astype(np.uint8)


def _check_file(path: str) -> None:
    """What VTK's readers trust a glTF file in: its header and its table of contents."""
    if path.lower().endswith(".obj"):
        return
    try:
        content = Path(path).read_bytes()
        text = content
        if path.lower().endswith(".glb"):
            magic, version, length, size, kind = struct.unpack("<4sIII4s", content[:20])
            if (magic, version, length, kind) != (b"glTF", 2, len(content), b"JSON"):
                raise DataError(f"{Path(path).name} is no whole GLB file of version 2")
            text = content[20 : 20 + size]
        table: Any = json.loads(text)
        meshes = table["meshes"]
    except (OSError, ValueError, struct.error, RecursionError) as error:
        raise DataError(f"{Path(path).name} is no glTF file ({error})") from error
    except (KeyError, TypeError) as error:
        raise DataError(f"{Path(path).name} holds no meshes") from error
    if not isinstance(meshes, list) or not meshes:
        raise DataError(f"{Path(path).name} holds no meshes")
