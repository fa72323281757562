//! JPEG and PNG bytes to pixels, with nothing believed that a header claims.

use super::Image;
use crate::{Error, On, Result};
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};
use std::io::Cursor;
use std::path::Path;

/// The largest image that is decoded, in pixels.
const MOST_PIXELS: u64 = 100_000_000;

/// Reads and decodes one JPEG or PNG file.
///
/// Gray files give 1 channel, all others 3; an alpha channel is dropped and 16 bits become 8. Errs
/// where the file cannot be read, is neither format, is damaged, or has more than 100 megapixels.
pub fn decode_file(path: impl AsRef<Path>) -> Result<Image> {
    let path = path.as_ref();
    let bytes = std::fs::read(path).on(path.display().to_string())?;
    decode(&bytes).map_err(|message| Error::input(path, message))
}

/// Decodes JPEG or PNG bytes; the error is a message without the file's name.
pub(super) fn decode(bytes: &[u8]) -> Result<Image, String> {
    // The decoders are written to return errors. Files come from anywhere, and a slip of theirs on
    // a crafted one should cost that image, not the run.
    std::panic::catch_unwind(|| decode_known(bytes))
        .unwrap_or_else(|_| Err("the decoder failed on this file".to_string()))
}

fn decode_known(bytes: &[u8]) -> Result<Image, String> {
    if bytes.is_empty() {
        return Err("the file is empty".to_string());
    }
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(one_line)?;
    match reader.format() {
        Some(ImageFormat::Jpeg) if cut_short(bytes) => {
            return Err("a truncated JPEG: its end marker is missing".to_string())
        }
        Some(ImageFormat::Jpeg | ImageFormat::Png) => {}
        _ => {
            let start: Vec<String> = bytes.iter().take(4).map(|b| format!("{b:02x}")).collect();
            return Err(format!("neither JPEG nor PNG: it starts with {}", start.join(" ")));
        }
    }
    let mut limits = Limits::default();
    limits.max_alloc = Some(MOST_PIXELS * 10); // RGBA of 16 bits is 8 bytes a pixel
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(one_line)?;
    let (width, height) = decoder.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    if pixels > MOST_PIXELS {
        return Err(format!("{width} x {height} pixels, the most that is decoded is {MOST_PIXELS}"));
    }
    if pixels == 0 {
        return Err(format!("an image of {width} x {height} pixels"));
    }
    let gray = !decoder.color_type().has_color();
    let decoded = DynamicImage::from_decoder(decoder).map_err(one_line)?;
    let (width, height) = (width as usize, height as usize);
    Ok(match gray {
        true => Image { width, height, channels: 1, pixels: decoded.into_luma8().into_raw() },
        false => Image { width, height, channels: 3, pixels: decoded.into_rgb8().into_raw() },
    })
}

/// Whether a JPEG has no end marker after its last scan. The decoder would fill what is missing
/// with gray. Inside a scan no marker can occur by chance, as every 0xff there is stuffed.
fn cut_short(bytes: &[u8]) -> bool {
    let last = |marker: u8| bytes.windows(2).rposition(|w| w == [0xff, marker]);
    last(0xd9) < last(0xda)
}

fn one_line(error: impl std::fmt::Display) -> String {
    error.to_string().lines().next().unwrap_or("unreadable").to_string()
}

/// Encodes as PNG, for tests that need files.
#[cfg(test)]
pub(super) fn png(image: &Image) -> Vec<u8> {
    let color = if image.channels == 1 { image::ColorType::L8 } else { image::ColorType::Rgb8 };
    encode(&image.pixels, image.width, image.height, color.into(), ImageFormat::Png)
}

#[cfg(test)]
fn encode(
    bytes: &[u8],
    width: usize,
    height: usize,
    color: image::ExtendedColorType,
    format: ImageFormat,
) -> Vec<u8> {
    let mut out = Cursor::new(Vec::new());
    image::write_buffer_with_format(&mut out, bytes, width as u32, height as u32, color, format).unwrap();
    out.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::ExtendedColorType as Color;

    #[test]
    fn gray_stays_gray_alpha_goes_and_sixteen_bits_become_eight() {
        let pixels = |bytes: &[u8], color| decode(&encode(bytes, 2, 1, color, ImageFormat::Png)).unwrap();
        let gray = Image { width: 2, height: 1, channels: 1, pixels: vec![7, 200] };
        assert_eq!(decode(&png(&gray)).unwrap(), gray);
        assert_eq!(pixels(&[7, 0, 200, 255], Color::La8), gray);
        let rgba = pixels(&[1, 2, 3, 0, 4, 5, 6, 255], Color::Rgba8);
        assert_eq!((rgba.channels, rgba.pixels), (3, vec![1, 2, 3, 4, 5, 6]));
        let wide: Vec<u8> = [257u16 * 7, 257 * 200].iter().flat_map(|v| v.to_ne_bytes()).collect();
        assert_eq!(pixels(&wide, Color::L16), gray);
        let jpeg = decode(&encode(&[90; 64], 8, 8, Color::L8, ImageFormat::Jpeg)).unwrap();
        assert_eq!((jpeg.channels, jpeg.width, jpeg.height), (1, 8, 8));
        assert!(jpeg.pixels.iter().all(|p| p.abs_diff(90) <= 2), "{:?}", jpeg.pixels);
    }

    #[test]
    fn damage_is_named() {
        let good = encode(&[90; 3 * 64 * 64], 64, 64, Color::Rgb8, ImageFormat::Jpeg);
        assert!(decode(&good).is_ok());
        assert!(decode(&good[..good.len() - 20]).unwrap_err().contains("truncated"));
        let png = png(&Image { width: 64, height: 64, channels: 1, pixels: vec![3; 4096] });
        assert!(decode(&png[..png.len() / 2]).is_err());
        assert!(decode(b"").unwrap_err().contains("empty"));
        assert!(decode(b"GIF89a..").unwrap_err().contains("47 49 46 38"));
    }

    /// A header of 20000 x 20000 pixels is refused before anything of that size is allocated.
    #[test]
    fn a_claim_of_400_megapixels_is_refused() {
        let mut bytes = png(&Image { width: 2, height: 1, channels: 1, pixels: vec![7, 200] });
        bytes[16..20].copy_from_slice(&20_000u32.to_be_bytes());
        bytes[20..24].copy_from_slice(&20_000u32.to_be_bytes());
        let mut crc = flate2::Crc::new();
        crc.update(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&crc.sum().to_be_bytes());
        assert!(decode(&bytes).unwrap_err().contains("20000 x 20000 pixels"));
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = decode_file("/nowhere/x.png").unwrap_err();
        assert!(error.to_string().contains("/nowhere/x.png") && error.exit_code() == 4);
    }
}
