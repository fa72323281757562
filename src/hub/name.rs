//! Hub names: checked before they become paths and addresses.

/// A name that is well formed.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Name {
    /// `org/name`.
    pub id: String,
    /// A branch, a tag, a commit or `refs/pr/N`.
    pub revision: String,
}

/// A segment of an id.
fn word(part: &str) -> bool {
    part.len() <= 96
        && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        && part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && !part.ends_with(['-', '.'])
        && !part.contains("--")
        && !part.contains("..")
}

/// A segment of a revision or a path.
fn step(part: &str) -> bool {
    !part.is_empty()
        && !part.starts_with('.')
        && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+".contains(&b))
}

impl Name {
    /// Of `org/name[@revision]`.
    pub fn parse(text: &str) -> Option<Self> {
        match Self::parse_data(text)? {
            (name, None) => Some(name),
            _ => None,
        }
    }

    /// Of `org/name[/folder][@revision]`, with the folder.
    pub fn parse_data(text: &str) -> Option<(Self, Option<String>)> {
        let (path, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (org, rest) = path.split_once('/')?;
        let (name, folder) = match rest.split_once('/') {
            Some((name, folder)) => (name, Some(folder.to_string())),
            None => (rest, None),
        };
        let folded = folder.as_deref().is_none_or(|folder| folder.split('/').all(step));
        let good = word(org) && word(name) && folded && revision.split('/').all(step);
        good.then(|| (Name { id: format!("{org}/{name}"), revision: revision.to_string() }, folder))
    }
}

/// Whether a text is a commit's 40 digits.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Whether a file's name in a repository stays within the folder that it is joined to.
#[cfg(feature = "hub")]
pub(super) fn stays_inside(file: &str) -> bool {
    let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
    !file.contains(['\\', ':', '\0']) && file.split('/').all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_before_they_become_paths() {
        let of = |id: &str, revision: &str| Some(Name { id: id.into(), revision: revision.into() });
        assert_eq!(Name::parse("google/vit-base_16.x"), of("google/vit-base_16.x", "main"));
        assert_eq!(Name::parse("a/b@v1.0"), of("a/b", "v1.0"));
        assert_eq!(Name::parse("a/b@refs/pr/1"), of("a/b", "refs/pr/1"));
        let (name, folder) = Name::parse_data("a/b/main/x@v1").unwrap();
        assert_eq!((Some(name), folder.as_deref()), (of("a/b", "v1"), Some("main/x")));
        for bad in [
            "",
            "gpt2",
            "a/",
            "/b",
            "a/b/c",
            "./b",
            "../b",
            "a/..",
            "a/b@",
            "a/b@..",
            "a/b@x/../y",
            "a/b@/etc",
            "a/b c",
            "a--b/c",
            "-a/b",
            "a/b-",
            "a/b\n",
            "a\\b/c",
            "ä/b",
            "a/b@x@y",
        ] {
            assert_eq!(Name::parse(bad), None, "{bad:?}");
        }
        for bad in ["a/b/..", "a/b/", "a/b/x//y", "a/b/x\\y", "a/b/.git"] {
            assert_eq!(Name::parse_data(bad), None, "{bad:?}");
        }
    }

    #[test]
    #[cfg(feature = "hub")]
    fn names_of_files_do_not_lead_out() {
        assert!(["a", "data/train-00000.parquet", ".gitattributes"].into_iter().all(stays_inside));
        assert!(!["", "/a", "../a", "a/../b", "a//b", "a\\b", "c:a", "a/."].into_iter().any(stays_inside));
    }
}
