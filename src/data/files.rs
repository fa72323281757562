//! The files below a folder or inside a tar archive, by name: listed once, read one at a time.
//!
//! Nothing is ever written to disk, so a name cannot lead anywhere; sizes are compared with what is
//! there before they are believed.

use crate::{Error, On, Result};
use flate2::read::MultiGzDecoder;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// The most bytes of a compressed file that are kept in memory.
pub(super) const MOST_IN_MEMORY: u64 = 8 << 30;
/// How deep folders are followed.
const DEEPEST: usize = 16;
const BLOCK: usize = 512;

/// Where a file's bytes are.
enum Place {
    /// In a file of its own.
    Path(PathBuf),
    /// Inside a plain tar: offset and length in bytes.
    Span(u64, u64),
    /// Decompressed from a compressed tar.
    Memory(Vec<u8>),
    /// Inside a compressed tar, with a name that no format here asks for.
    Dropped,
}

/// A listing, sorted by name; names have `/` between their parts.
pub(super) struct Files {
    /// The folder or archive.
    pub path: PathBuf,
    /// What was left out of the listing, one line each.
    pub left_out: Vec<String>,
    /// All folder names, to tell which are empty.
    pub folders: BTreeSet<String>,
    names: Vec<String>,
    places: Vec<Place>,
}

/// Whether a name ends like an image that can be decoded.
pub(super) fn is_image(name: &str) -> bool {
    ends_with(name, &[".jpg", ".jpeg", ".png"])
}

/// Whether a name ends like an archive.
pub(super) fn is_archive(name: &str) -> bool {
    ends_with(name, &[".tar", ".tar.gz", ".tgz"])
}

fn ends_with(name: &str, ends: &[&str]) -> bool {
    let name = name.to_ascii_lowercase();
    ends.iter().any(|end| name.ends_with(end))
}

/// What is kept of a compressed archive: images, and the files of the two binary formats.
fn is_wanted(name: &str) -> bool {
    is_image(name) || ends_with(name, &[".bin", "batches.meta.txt", "-ubyte", "-ubyte.gz"])
}

/// A name in parts, or none for one that is absolute or climbs out with `..`.
fn parts(name: &str) -> Option<Vec<&str>> {
    if name.starts_with('/') || name.split('/').any(|p| p == "..") {
        return None;
    }
    Some(name.split('/').filter(|p| !p.is_empty() && *p != ".").collect())
}

/// Files that desktops leave behind: hidden ones, and the second half of macOS files.
fn is_hidden(part: &str) -> bool {
    part.starts_with('.') || part == "__MACOSX"
}

impl Files {
    /// Lists a folder, a tar or a compressed tar, told apart by their content.
    pub fn open(path: &Path) -> Result<Self> {
        let meta = std::fs::metadata(path).on(path.display().to_string())?;
        let mut listing = Listing::default();
        if meta.is_dir() {
            let mut above = Vec::new();
            listing.walk(path, "", &mut above)?;
        } else {
            let mut file = File::open(path).on(path.display().to_string())?;
            let start = read_start(&mut file).on(path.display().to_string())?;
            file.seek(SeekFrom::Start(0)).on(path.display().to_string())?;
            if start.starts_with(&[0x1f, 0x8b]) {
                let inner = read_start(&mut MultiGzDecoder::new(&file))
                    .map_err(|e| Error::input(path, format!("a damaged gzip file: {e}")))?;
                if !is_tar(&inner) {
                    return Err(Error::input(path, format!("gzip of {}", what_is(&inner))));
                }
                file.seek(SeekFrom::Start(0)).on(path.display().to_string())?;
                listing.compressed(path, MultiGzDecoder::new(BufReader::new(file)))?;
            } else if is_tar(&start) {
                listing.plain(path, file, meta.len())?;
            } else {
                return Err(Error::input(path, what_is(&start)));
            }
        }
        Ok(listing.finish(path))
    }

    /// The names, sorted.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The index of the file called `name`.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.names.binary_search_by(|n| n.as_str().cmp(name)).ok()
    }

    /// The path to put into messages about file `index`.
    pub fn full_name(&self, index: usize) -> PathBuf {
        match &self.places[index] {
            Place::Path(path) => path.clone(),
            _ => self.path.join(&self.names[index]),
        }
    }

    /// The bytes of file `index`.
    pub fn read(&self, index: usize) -> Result<Cow<'_, [u8]>> {
        let name = || self.full_name(index).display().to_string();
        match &self.places[index] {
            Place::Path(path) => Ok(Cow::Owned(std::fs::read(path).on(name())?)),
            Place::Memory(bytes) => Ok(Cow::Borrowed(bytes)),
            Place::Span(offset, length) => {
                // A handle per read: handles share their position, and readers are many threads.
                let mut file = File::open(&self.path).on(name())?;
                file.seek(SeekFrom::Start(*offset)).on(name())?;
                let mut bytes = vec![0; *length as usize];
                file.read_exact(&mut bytes).on(name())?;
                Ok(Cow::Owned(bytes))
            }
            Place::Dropped => Err(Error::input(self.full_name(index), "not an image or a data file")),
        }
    }
}

/// A listing as it grows.
#[derive(Default)]
struct Listing {
    files: BTreeMap<String, Place>,
    folders: BTreeSet<String>,
    climbing: usize,
    links: usize,
}

impl Listing {
    fn walk(&mut self, folder: &Path, prefix: &str, above: &mut Vec<PathBuf>) -> Result<()> {
        let label = || folder.display().to_string();
        let real = folder.canonicalize().on(label())?;
        // A link back to a folder above would never end.
        if above.contains(&real) || above.len() >= DEEPEST {
            return Ok(());
        }
        above.push(real);
        for entry in std::fs::read_dir(folder).on(label())? {
            let entry = entry.on(label())?;
            let part = entry.file_name().to_string_lossy().into_owned();
            if is_hidden(&part) {
                continue;
            }
            let (path, name) = (entry.path(), format!("{prefix}{part}"));
            match std::fs::metadata(&path) {
                Ok(meta) if meta.is_dir() => {
                    self.walk(&path, &format!("{name}/"), above)?;
                    self.folders.insert(name);
                }
                Ok(meta) if meta.is_file() => drop(self.files.insert(name, Place::Path(path))),
                _ => self.links += 1, // a link to nothing, a socket
            }
        }
        above.pop();
        Ok(())
    }

    fn plain(&mut self, path: &Path, file: File, length: u64) -> Result<()> {
        let damaged = |e: std::io::Error| Error::input(path, format!("a damaged tar archive: {e}"));
        let mut archive = tar::Archive::new(file);
        for entry in archive.entries_with_seek().map_err(damaged)? {
            let entry = entry.map_err(damaged)?;
            let Some(name) = self.place(&entry) else { continue };
            let (offset, size) = (entry.raw_file_position(), entry.size());
            if offset.checked_add(size).is_none_or(|end| end > length) {
                let there = length.saturating_sub(offset);
                return Err(truncated(path, &name, size, there));
            }
            self.files.insert(name, Place::Span(offset, size));
        }
        Ok(())
    }

    fn compressed(&mut self, path: &Path, reader: impl Read) -> Result<()> {
        let damaged = |e: std::io::Error| Error::input(path, format!("a damaged tar.gz archive: {e}"));
        let mut archive = tar::Archive::new(reader);
        let mut left = MOST_IN_MEMORY;
        for entry in archive.entries().map_err(damaged)? {
            let mut entry = entry.map_err(damaged)?;
            let Some(name) = self.place(&entry) else { continue };
            if !is_wanted(&name) {
                self.files.insert(name, Place::Dropped);
                continue;
            }
            let size = entry.size();
            let mut bytes = Vec::new(); // grows with what is there, whatever the header claims
            (&mut entry).take(left.saturating_add(1)).read_to_end(&mut bytes).map_err(damaged)?;
            let there = bytes.len() as u64;
            left = left.checked_sub(there).ok_or_else(|| {
                let gib = MOST_IN_MEMORY >> 30;
                Error::Fit(format!(
                    "{}: more than {gib} GiB of files in it: unpack it into a folder or a plain tar",
                    path.display()
                ))
            })?;
            if there < size {
                return Err(truncated(path, &name, size, there));
            }
            self.files.insert(name, Place::Memory(bytes));
        }
        Ok(())
    }

    /// The cleaned name of a regular file with content, or none where there is nothing to keep.
    fn place<R: Read>(&mut self, entry: &tar::Entry<'_, R>) -> Option<String> {
        let raw = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let Some(parts) = parts(&raw) else {
            self.climbing += 1;
            return None;
        };
        if parts.is_empty() || parts.iter().any(|p| is_hidden(p)) {
            return None;
        }
        let kind = entry.header().entry_type();
        let is_folder = kind.is_dir() || raw.ends_with('/'); // the oldest archives mark them so
        let folders = parts.len() - usize::from(!is_folder);
        for n in 1..=folders {
            self.folders.insert(parts[..n].join("/"));
        }
        if is_folder {
            return None;
        }
        if !(kind.is_file() || kind.is_contiguous()) {
            self.links += 1; // links, devices and sparse files have no bytes of their own to read
            return None;
        }
        Some(parts.join("/"))
    }

    fn finish(self, path: &Path) -> Files {
        let mut left_out = Vec::new();
        if self.climbing > 0 {
            left_out.push(format!("{} entries with absolute names or `..` left out", self.climbing));
        }
        if self.links > 0 {
            left_out.push(format!("{} links or special files left out", self.links));
        }
        let (names, places) = self.files.into_iter().unzip();
        Files { path: path.to_path_buf(), left_out, folders: self.folders, names, places }
    }
}

fn truncated(path: &Path, name: &str, size: u64, there: u64) -> Error {
    Error::input(path, format!("a truncated archive: {name} should have {size} bytes, {there} are there"))
}

/// The first block of a file, or all of a shorter one.
fn read_start(reader: &mut impl Read) -> std::io::Result<Vec<u8>> {
    let mut start = Vec::with_capacity(BLOCK);
    reader.take(BLOCK as u64).read_to_end(&mut start)?;
    Ok(start)
}

/// Whether a first block is a tar header: its own checksum says so (all zeros is an empty archive).
fn is_tar(block: &[u8]) -> bool {
    if block.len() < BLOCK {
        return false;
    }
    if block.iter().all(|&b| b == 0) {
        return true;
    }
    // The checksum at 148..156 counts as eight spaces.
    let sum: u32 = block.iter().map(|&b| u32::from(b)).sum::<u32>()
        - block[148..156].iter().map(|&b| u32::from(b)).sum::<u32>()
        + 8 * 32;
    let text: String = block[148..156].iter().map(|&b| char::from(b)).collect();
    u32::from_str_radix(text.trim_matches(|c: char| c == '\0' || c == ' '), 8).is_ok_and(|found| found == sum)
}

/// What a file that is no archive seems to be, and what to do about it.
fn what_is(start: &[u8]) -> String {
    let known: [(&[u8], &str); 9] = [
        (&[0, 0, 8], "one IDX file: give the folder that holds it and its partners"),
        (&[0xff, 0xd8, 0xff], "one JPEG image: give a folder with a folder of images per class"),
        (b"\x89PNG", "one PNG image: give a folder with a folder of images per class"),
        (b"PAR1", "a Parquet file, which this build does not read: export its images into folders"),
        (b"PK\x03\x04", "a zip archive: unpack it, or make it a tar"),
        (b"BZh", "a bzip2 file: decompress it first"),
        (b"\xfd7zXZ", "an xz file: decompress it first"),
        (b"\x28\xb5\x2f\xfd", "a zstd file: decompress it first"),
        (b"", "neither a folder nor a tar or tar.gz archive"),
    ];
    let text = known.iter().find(|(magic, _)| start.starts_with(magic)).map_or("", |(_, text)| text);
    if start.is_empty() {
        return "an empty file".to_string();
    }
    text.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{decode::png, DataConfig, Dataset, Image};
    use std::io::Write;

    fn pixel(value: u8) -> Vec<u8> {
        png(&Image { width: 1, height: 1, channels: 1, pixels: vec![value] })
    }

    /// A tar of files (a name that ends with `/` is a folder), with names taken as they are.
    fn tar(entries: &[(&str, &[u8])]) -> Vec<u8> {
        let mut out = tar::Builder::new(Vec::new());
        for (name, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            let kind = if name.ends_with('/') { tar::EntryType::Directory } else { tar::EntryType::Regular };
            header.set_entry_type(kind);
            header.set_size(content.len() as u64);
            header.set_cksum();
            out.append(&header, *content).unwrap();
        }
        out.into_inner().unwrap()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    }

    fn open(dir: &Path, name: &str, bytes: &[u8], strict: bool) -> Result<Dataset> {
        std::fs::write(dir.join(name), bytes).unwrap();
        DataConfig { path: Some(dir.join(name)), strict, ..Default::default() }.open(0)
    }

    fn refused(name: &str, bytes: &[u8]) -> String {
        let dir = tempfile::tempdir().unwrap();
        let error = open(dir.path(), name, bytes, false).err().expect("this archive is bad");
        assert_eq!(error.exit_code(), 4, "{error}");
        let text = error.to_string();
        assert!(text.contains(name), "{text}");
        text
    }

    /// Four images, one below an absolute and one below a climbing name, and a repeated name.
    fn odd(images: &[Vec<u8>]) -> Vec<u8> {
        let names = ["x/train/a/1.png", "x/train/b/1.png", "/etc/a/2.png", "../a/3.png", "x/train/a/1.png"];
        let mut entries: Vec<(&str, &[u8])> = names.iter().zip(images).map(|(n, i)| (*n, &i[..])).collect();
        entries.extend([
            ("x/val/b/9.png", &images[5][..]),
            ("x/train/a/._1.png", b"junk"),
            ("x/words.txt", b""),
        ]);
        tar(&entries)
    }

    #[test]
    fn archives_are_told_by_content_and_names_cannot_climb() {
        let images: Vec<Vec<u8>> = (0..6).map(pixel).collect();
        let plain = odd(&images);
        let dir = tempfile::tempdir().unwrap();
        for bytes in [plain.clone(), gzip(&plain)] {
            let data = open(dir.path(), "no-ending", &bytes, false).unwrap();
            assert_eq!((data.train.len(), data.eval.len()), (2, 1));
            assert_eq!(data.train.image(0).unwrap().pixels, [4], "the later entry of a name wins");
            assert!(data.notes[0].contains("2 entries with absolute names"), "{:?}", data.notes);
            assert!(open(dir.path(), "no-ending", &bytes, true).is_err());
        }
    }

    #[test]
    fn truncated_and_lying_archives_are_refused() {
        let noise: Vec<u8> = (0..3000u32).map(|i| (i * i % 251) as u8).collect();
        let whole = tar(&[("a/1.png", &pixel(1)), ("b/2.png", &noise)]);
        let cut = &whole[..2500];
        assert!(
            refused("x.tar", cut).contains("b/2.png should have 3000 bytes"),
            "{}",
            refused("x.tar", cut)
        );
        assert!(refused("x.tar.gz", &gzip(cut)).contains("b/2.png should have 3000 bytes"));
        let zipped = gzip(&whole);
        assert!(refused("x.tar.gz", &zipped[..zipped.len() - 40]).contains("damaged"));
        // A header that claims an exabyte.
        let mut lying = whole.clone();
        let mut header = tar::Header::new_gnu();
        header.set_path("a/1.png").unwrap();
        header.set_size(1 << 60);
        header.set_cksum();
        lying[..512].copy_from_slice(header.as_bytes());
        assert!(refused("x.tar", &lying).contains("1152921504606846976 bytes"));
        assert!(refused("x.tar.gz", &gzip(&lying)).contains("1152921504606846976 bytes"));
        // A damaged second header.
        let mut broken = whole;
        broken[1024 + 20] ^= 0x55;
        refused("x.tar", &broken);
        assert!(refused("x.tar", &[0; 1024]).contains("no images"));
    }

    #[test]
    fn other_files_are_told_by_name() {
        assert!(refused("x.tar", b"PK\x03\x04....").contains("zip"));
        assert!(refused("x.jpg", &[0xff, 0xd8, 0xff, 0xe0]).contains("one JPEG"));
        assert!(refused("x", &[0, 0, 8, 3, 0, 0]).contains("one IDX file"));
        assert!(refused("x.gz", &gzip(&[0, 0, 8, 3, 0, 0])).contains("gzip of one IDX file"));
        assert!(refused("x.parquet", b"PAR1").contains("Parquet"));
        assert!(refused("x", b"").contains("empty"));
        assert!(refused("x", b"hello").contains("neither a folder nor a tar"));
    }

    #[test]
    fn a_folder_of_archives_is_opened_with_a_note() {
        let class = |split: &str, n: u8| {
            let names = ["a/1", "b/1", "b/2"].map(|name| format!("{split}/{name}.png"));
            let images: Vec<Vec<u8>> = (n..n + 3).map(pixel).collect();
            tar(&names.iter().zip(&images).map(|(n, i)| (&n[..], &i[..])).collect::<Vec<_>>())
        };
        let dir = tempfile::tempdir().unwrap();
        let open = || DataConfig { path: Some(dir.path().into()), ..Default::default() }.open(0);
        std::fs::write(dir.path().join("set-train.tar"), class("train", 10)).unwrap();
        assert!(open().unwrap().notes[0].contains("its one archive set-train.tar"));
        std::fs::write(dir.path().join("set-test.tgz"), gzip(&class("test", 20))).unwrap();
        let data = open().unwrap();
        assert_eq!(data.train.image(0).unwrap().pixels, [10]);
        assert_eq!(data.eval.image(1).unwrap().pixels, [21]);
        assert!(data.notes[0].contains("set-test.tgz"), "{:?}", data.notes);
        std::fs::rename(dir.path().join("set-test.tgz"), dir.path().join("other.tgz")).unwrap();
        assert!(open().err().unwrap().to_string().contains("no images found"));
    }

    #[cfg(unix)]
    #[test]
    fn links_that_lead_back_up_end() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("a")).unwrap();
        std::fs::write(dir.path().join("a/1.png"), pixel(1)).unwrap();
        std::os::unix::fs::symlink(dir.path(), dir.path().join("a/up")).unwrap();
        std::os::unix::fs::symlink("/nowhere/at/all", dir.path().join("a/gone")).unwrap();
        let files = Files::open(dir.path()).unwrap();
        assert_eq!(files.names(), ["a/1.png"]);
        assert_eq!(files.left_out, ["1 links or special files left out"]);
    }
}
