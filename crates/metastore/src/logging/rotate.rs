//! A log file that is put aside when it has grown, with the names, the limits and the meaning that etcd's has (those of
//! lumberjack).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

/// The time in a backup's name: 2026-11-27T18-45-00.123.
const NAME_FORMAT: &str = "%Y-%m-%dT%H-%M-%S%.3f";
const COMPRESSED: &str = ".gz";

/// How to rotate (`--log-rotation-config-json`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rotation {
    /// Size beyond which no line is added to the file, in bytes. A longer line goes alone.
    pub bytes_max: u64,
    /// Backups older than this many days are removed; 0 keeps them however old.
    pub age_days_max: u32,
    /// Most backups; 0 keeps all.
    pub backups_max: usize,
    /// Whether backups are named by local time instead of UTC.
    pub local_time: bool,
    /// Whether backups are compressed with gzip.
    pub compress: bool,
}

/// The file that is written to. Backups are removed and compressed by a thread of their own, since both take time.
pub(super) struct RotatingFile {
    backups: Arc<Backups>,
    file: File,
    bytes: u64,
}

struct Backups {
    path: PathBuf,
    rotation: Rotation,
    /// Whether the thread runs.
    tidying: AtomicBool,
}

impl RotatingFile {
    /// Opens the file at its end.
    ///
    /// # Errors
    /// It cannot be opened for writing.
    pub(super) fn open(path: &Path, rotation: Rotation) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        let bytes = file.metadata()?.len();
        let backups = Arc::new(Backups {
            path: path.to_owned(),
            rotation,
            tidying: AtomicBool::new(false),
        });
        Ok(RotatingFile { backups, file, bytes })
    }

    /// Puts the file aside and begins a new one.
    fn rotate(&mut self) -> io::Result<()> {
        let Backups { path, rotation, .. } = &*self.backups;
        fs::rename(path, self.backups.name(Timestamp::now(), rotation.local_time))?;
        self.file = OpenOptions::new().append(true).create(true).open(path)?;
        self.bytes = 0;
        if !self.backups.tidying.swap(true, Ordering::AcqRel) {
            let backups = self.backups.clone();
            let tidy = move || {
                // Best effort: what is left over is looked at again after the next rotation.
                let _ = backups.tidy(Timestamp::now());
                backups.tidying.store(false, Ordering::Release);
            };
            if std::thread::Builder::new()
                .name("log-tidy".to_owned())
                .spawn(tidy)
                .is_err()
            {
                self.backups.tidying.store(false, Ordering::Release);
            }
        }
        Ok(())
    }
}

impl Write for RotatingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let more = bytes.len() as u64;
        // A file that cannot be put aside is better than no log; it is tried again with the next line.
        if self.bytes > 0 && self.bytes + more > self.backups.rotation.bytes_max {
            let _ = self.rotate();
        }
        self.file.write_all(bytes)?;
        self.bytes += more;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Backups {
    /// The parts of a backup's name around its time.
    fn affixes(&self) -> (String, String) {
        let text = |part: Option<&std::ffi::OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
        let extension = text(self.path.extension());
        let suffix = if extension.is_empty() {
            String::new()
        } else {
            format!(".{extension}")
        };
        (format!("{}-", text(self.path.file_stem())), suffix)
    }

    fn zone(local: bool) -> TimeZone {
        if local { TimeZone::system() } else { TimeZone::UTC }
    }

    /// A name that no backup has yet: the time, or a few milliseconds later.
    fn name(&self, now: Timestamp, local: bool) -> PathBuf {
        let (prefix, suffix) = self.affixes();
        let zone = Self::zone(local);
        let mut time = now;
        loop {
            let shown = time.to_zoned(zone.clone()).strftime(NAME_FORMAT).to_string();
            let path = self.path.with_file_name(format!("{prefix}{shown}{suffix}"));
            let compressed = self.path.with_file_name(format!("{prefix}{shown}{suffix}{COMPRESSED}"));
            if !path.exists() && !compressed.exists() {
                return path;
            }
            time += SignedDuration::from_millis(1);
        }
    }

    /// All backups, the newest first.
    fn list(&self) -> io::Result<Vec<(DateTime, PathBuf)>> {
        let (prefix, suffix) = self.affixes();
        let dir = match self.path.parent() {
            Some(dir) if dir != Path::new("") => dir,
            _ => Path::new("."),
        };
        let mut backups = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let plain = name.strip_suffix(COMPRESSED).unwrap_or(&name);
            let time = plain.strip_prefix(&prefix).and_then(|rest| rest.strip_suffix(&suffix));
            // What has no time where we put it is not ours.
            if let Some(time) = time.and_then(|text| DateTime::strptime(NAME_FORMAT, text).ok()) {
                backups.push((time, entry.path()));
            }
        }
        backups.sort_by(|a, b| b.cmp(a));
        Ok(backups)
    }

    /// Removes backups that are too old or too many, and compresses the others if that is wanted.
    fn tidy(&self, now: Timestamp) -> io::Result<()> {
        let Rotation {
            age_days_max,
            backups_max,
            local_time,
            compress,
            ..
        } = self.rotation;
        let oldest =
            now.to_zoned(Self::zone(local_time)).datetime() - SignedDuration::from_hours(24 * i64::from(age_days_max));
        for (at, (time, path)) in self.list()?.into_iter().enumerate() {
            let too_many = backups_max > 0 && at >= backups_max;
            let too_old = age_days_max > 0 && time < oldest;
            if too_many || too_old {
                fs::remove_file(path)?;
            } else if compress && path.extension().is_none_or(|extension| extension != "gz") {
                compress_file(&path)?;
            }
        }
        Ok(())
    }
}

/// Replaces a file by its compressed form. Should it be cut off, the file is still there and it is done again.
fn compress_file(path: &Path) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(COMPRESSED);
    let mut half_done = name.clone();
    half_done.push(".tmp");
    let mut encoder = flate2::write::GzEncoder::new(File::create(&half_done)?, flate2::Compression::default());
    io::copy(&mut File::open(path)?, &mut encoder)?;
    encoder.finish()?.sync_all()?;
    fs::rename(half_done, name)?;
    fs::remove_file(path)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    const ROTATION: Rotation = Rotation {
        bytes_max: 100,
        age_days_max: 0,
        backups_max: 0,
        local_time: false,
        compress: false,
    };

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn settle(file: &RotatingFile) {
        while file.backups.tidying.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn no_line_is_cut_or_lost_and_no_file_grows_beyond_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.log");
        fs::write(&path, "from before\n").unwrap();
        let mut file = RotatingFile::open(&path, ROTATION).unwrap();
        let mut written = "from before\n".to_owned();
        for number in 0..100 {
            let line = format!("{number} {}\n", "x".repeat(number % 40));
            file.write_all(line.as_bytes()).unwrap();
            written += &line;
        }
        file.write_all("y".repeat(300).as_bytes()).unwrap();
        written += &"y".repeat(300);
        settle(&file);
        let mut read = String::new();
        let mut all = file.backups.list().unwrap();
        all.reverse();
        assert!(all.len() > 10);
        for path in all.into_iter().map(|(_, path)| path).chain([path]) {
            let text = fs::read_to_string(path).unwrap();
            assert!(text.len() <= 100 || text.starts_with('y'), "{text}");
            read += &text;
        }
        assert_eq!(read, written);
    }

    #[test]
    fn backups_are_named_and_tidied_as_lumberjack_does() {
        let dir = tempfile::tempdir().unwrap();
        let rotation = Rotation {
            backups_max: 3,
            age_days_max: 2,
            compress: true,
            ..ROTATION
        };
        let file = RotatingFile::open(&dir.path().join("m.log"), rotation).unwrap();
        let now: Timestamp = "2026-11-27T18:45:00.123Z".parse().unwrap();
        assert_eq!(
            file.backups.name(now, false).file_name().unwrap(),
            "m-2026-11-27T18-45-00.123.log"
        );
        for name in [
            "m-2026-11-27T18-45-00.123.log",
            "m-2026-11-27T10-00-00.000.log.gz",
            "m-2026-11-26T10-00-00.000.log",
            "m-2026-11-26T09-00-00.000.log",
            "m-2026-11-20T09-00-00.000.log",
            "m-notes.log",
            "other-2026-11-20T09-00-00.000.log",
        ] {
            fs::write(dir.path().join(name), "text").unwrap();
        }
        // A name that is taken is not used again.
        assert_eq!(
            file.backups.name(now, false).file_name().unwrap(),
            "m-2026-11-27T18-45-00.124.log"
        );
        file.backups.tidy(now).unwrap();
        assert_eq!(
            names(dir.path()),
            [
                "m-2026-11-26T10-00-00.000.log.gz",
                "m-2026-11-27T10-00-00.000.log.gz",
                "m-2026-11-27T18-45-00.123.log.gz",
                "m-notes.log",
                "m.log",
                "other-2026-11-20T09-00-00.000.log",
            ]
        );
        let packed = File::open(dir.path().join("m-2026-11-27T18-45-00.123.log.gz")).unwrap();
        let mut text = String::new();
        flate2::read::GzDecoder::new(packed).read_to_string(&mut text).unwrap();
        assert_eq!(text, "text");
        let only_old = Rotation {
            backups_max: 0,
            ..rotation
        };
        let file = RotatingFile::open(&dir.path().join("m.log"), only_old).unwrap();
        file.backups.tidy(now + SignedDuration::from_hours(39)).unwrap();
        assert_eq!(file.backups.list().unwrap().len(), 2);
    }
}
