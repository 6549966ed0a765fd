"""A ramp of gray levels and DICOM files of it."""

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

RAMP = np.linspace(0, 255, 64 * 48).reshape(48, 64).astype(np.uint8)


def gray(image):
    return np.asarray(image.convert("L")).astype(int)


def write_dicom(path, pixels, *, meta_syntax=ExplicitVRLittleEndian, data=None, **fields):
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = meta_syntax
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = CTImageStorage
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = "1.2.3"
    header.Rows, header.Columns = pixels.shape[-2:] if fields.get("SamplesPerPixel", 1) == 1 else pixels.shape[-3:-1]
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated = header.BitsStored = 8 * pixels.itemsize
    header.HighBit, header.PixelRepresentation = header.BitsStored - 1, int(pixels.dtype.kind == "i")
    for name, value in fields.items():
        setattr(header, name, value)
    header.PixelData = pixels.tobytes() if data is None else data
    header["PixelData"].VR = "OW" if pixels.itemsize > 1 else "OB"
    header.save_as(path, enforce_file_format=True)
    return path
