#!/usr/bin/env bash
# vtk 9.7.2: vtkWindowToImageFilter, the usual way from a window to an array, draws the window itself
# when it updates. After render_window.Render() the scene is drawn a second time for each filter, so
# that colours and depths of one view cost three drawings; ShouldRerenderOff() makes it one. With
# SetScale(2) it draws one tile after the other: four times.
#
# Seen: Render: 1 drawing; a filter's Update: 1 more; with ShouldRerenderOff: 0; with SetScale(2): 4.
# Fails when that changes. It draws without a screen (EGL or OSMesa).
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q vtk==9.7.2
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import vtk

print("vtk", vtk.vtkVersion.GetVTKVersion())
renderer, window = vtk.vtkRenderer(), vtk.vtkRenderWindow()
window.SetOffScreenRendering(1)
window.SetSize(64, 64)
window.AddRenderer(renderer)
ball, mapper, actor = vtk.vtkSphereSource(), vtk.vtkPolyDataMapper(), vtk.vtkActor()
mapper.SetInputConnection(ball.GetOutputPort())
actor.SetMapper(mapper)
renderer.AddActor(actor)
drawn = [0]
renderer.AddObserver("StartEvent", lambda *_: drawn.__setitem__(0, drawn[0] + 1))
window.Render()
print("Render:", drawn[0])
assert drawn[0] == 1


def drawings(prepare) -> int:
    images = vtk.vtkWindowToImageFilter()
    images.SetInput(window)
    prepare(images)
    before = drawn[0]
    images.Update()
    return drawn[0] - before


for what, prepare, wanted in (
    ("colours", lambda images: None, 1),
    ("depths", lambda images: images.SetInputBufferTypeToZBuffer(), 1),
    ("ShouldRerenderOff", lambda images: images.ShouldRerenderOff(), 0),
    ("SetScale(2)", lambda images: images.SetScale(2), 4),
):
    found = drawings(prepare)
    print(f"{what}: {found}")
    assert found == wanted
PY
