"""The command line in this process, and pictures of every kind for it."""

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid
from typer.testing import CliRunner

from medv.cli import app
from medv.phantoms.pictures import phantom_image, phantom_scene

SHORT = ("--gen-length", "4", "--block-length", "4", "--steps", "4")


def run(*arguments, typed=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=typed)


def save_dicom(path):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 40, 30, 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.WindowCenter, data.WindowWidth = 500, 1000
    data.PixelData = np.arange(1200, dtype=np.uint16).tobytes()
    pydicom.dcmwrite(path, data)


def save_picture(path, kind):
    phantom = phantom_image(phantom_scene("test", 1), 96)
    if kind == "dicom":
        save_dicom(path)
    elif kind == "sixteen-bit":
        Image.fromarray(np.asarray(phantom.convert("L")).astype(np.uint16) * 257).save(path)
    elif kind == "rgba":
        phantom.convert("RGBA").save(path)
    else:
        phantom.save(path)
