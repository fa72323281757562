//! Models and data sets by hub name, against a hub of the test's own on loopback: what is asked, who hears
//! the token, what a broken transfer leaves, what the cache looks like.
#![cfg(feature = "hub")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use qtune::hub::Hub;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_secretOfTheTest";

/// A request as it came in.
#[derive(Clone, Debug)]
struct Asked {
    method: String,
    path: String,
    headers: BTreeMap<String, String>,
}

impl Asked {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// Where the range that was asked for begins.
    fn from(&self) -> usize {
        let range = self.header("range").and_then(|r| r.strip_prefix("bytes="));
        range.and_then(|r| r.strip_suffix('-')).and_then(|n| n.parse().ok()).unwrap_or(0)
    }
}

/// What is sent back; a body may be longer than what is sent of it.
struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    sent: Option<usize>,
}

fn answer(status: u16) -> Answer {
    Answer { status, headers: Vec::new(), body: Vec::new(), sent: None }
}

impl Answer {
    fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.headers.push((name.to_string(), value.to_string()));
        self
    }

    fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    fn broken_after(mut self, sent: usize) -> Self {
        self.sent = Some(sent);
        self
    }
}

type Rule = dyn Fn(&Asked) -> Answer + Send + Sync;

/// A server of one rule, with everything that it was asked.
struct Server {
    address: String,
    log: Arc<Mutex<Vec<Asked>>>,
}

impl Server {
    fn new(rule: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let log: Arc<Mutex<Vec<Asked>>> = Arc::default();
        let (rule, kept): (Arc<Rule>, _) = (Arc::new(rule), log.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (rule, kept) = (rule.clone(), kept.clone());
                std::thread::spawn(move || serve(stream, &*rule, &kept));
            }
        });
        Server { address, log }
    }

    fn asked(&self) -> Vec<Asked> {
        self.log.lock().unwrap().clone()
    }

    /// How often a file was asked for by this method.
    fn count(&self, method: &str, end: &str) -> usize {
        self.asked().iter().filter(|a| a.method == method && a.path.ends_with(end)).count()
    }
}

/// One request a connection.
fn serve(stream: TcpStream, rule: &Rule, log: &Mutex<Vec<Asked>>) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace().map(str::to_string);
    let (method, path) = (words.next()?, words.next()?);
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_string());
    }
    let asked = Asked { method, path, headers };
    log.lock().unwrap().push(asked.clone());
    let answer = rule(&asked);
    let mut stream = stream;
    let mut head = format!("HTTP/1.1 {} x\r\nConnection: close\r\n", answer.status);
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += &format!("Content-Length: {}\r\n\r\n", answer.body.len());
    stream.write_all(head.as_bytes()).ok()?;
    if asked.method != "HEAD" {
        stream.write_all(&answer.body[..answer.sent.unwrap_or(answer.body.len())]).ok()?;
    }
    stream.flush().ok()
}

/// Bytes of a file, whole or from where they are asked for.
fn ranged(asked: &Asked, bytes: &[u8]) -> Answer {
    match asked.from() {
        0 => answer(200).body(bytes),
        from if from >= bytes.len() => answer(416).with("Content-Range", format!("bytes */{}", bytes.len())),
        from => answer(206)
            .with("Content-Range", format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len()))
            .body(&bytes[from..]),
    }
}

fn sha256(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest.as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

/// The list of files of a repository.
fn list(files: &[&str]) -> Answer {
    let siblings: Vec<_> = files.iter().map(|f| serde_json::json!({"rfilename": f})).collect();
    answer(200).body(serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string())
}

/// A small file, straight from the hub.
fn small(asked: &Asked, text: &str) -> Answer {
    ranged(asked, text.as_bytes()).with("ETag", format!("\"etag-{}\"", text.len()))
}

fn weights() -> Vec<u8> {
    let header = br#"{"w":{"dtype":"F32","shape":[2000],"data_offsets":[0,8000]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend((0..2000).flat_map(|i| (i as f32).to_le_bytes()));
    bytes
}

/// The address of the large file on another server, and its headers on the hub.
fn elsewhere(cdn: &str, etag: &str, size: usize) -> Answer {
    answer(302)
        .with("Location", format!("{cdn}/large?signature=x"))
        .with("X-Linked-Etag", format!("\"{etag}\""))
        .with("X-Linked-Size", size)
}

/// A hub with the model `org/net`, whose weights lie on the server at `cdn`.
fn net(cdn: String, etag: String) -> Server {
    let size = weights().len();
    Server::new(move |asked| match asked.path.as_str() {
        "/api/models/org/net/revision/main" | "/api/models/org/net/revision/refs%2Fpr%2F1" => {
            list(&["config.json", "model.safetensors", "README.md", "tokenizer.json", "../evil"])
        }
        path if path.ends_with("/config.json") => small(asked, r#"{"model_type": "llama"}"#),
        // As for a repository that was renamed.
        path if path.ends_with("net/resolve/0123456789abcdef0123456789abcdef01234567/tokenizer.json") => {
            answer(307).with("Location", "/moved/tokenizer.json")
        }
        "/moved/tokenizer.json" => small(asked, "{}"),
        path if path.ends_with("/model.safetensors") => elsewhere(&cdn, &etag, size),
        _ => answer(404),
    })
}

fn hub(cache: &Path, server: &Server) -> Hub {
    Hub::new(cache).with_endpoint(&server.address).unwrap().with_pause(Duration::ZERO)
}

#[test]
fn a_model_comes_into_the_shared_cache_and_the_token_stays_with_the_hub() {
    let cdn = Server::new(|asked| ranged(asked, &weights()));
    let etag = sha256(&weights());
    let server = net(cdn.address.clone(), etag.clone());
    let cache = tempfile::tempdir().unwrap();
    let hub = hub(cache.path(), &server).with_token(TOKEN).unwrap();
    let snapshot = hub.model("org/net").unwrap();

    let folder = cache.path().join("models--org--net");
    assert_eq!(snapshot, folder.join("snapshots").join(COMMIT));
    assert_eq!(std::fs::read_to_string(folder.join("refs/main")).unwrap(), COMMIT);
    assert_eq!(std::fs::read(folder.join("blobs").join(&etag)).unwrap(), weights());
    assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), weights());
    #[cfg(unix)]
    {
        let link = std::fs::read_link(snapshot.join("model.safetensors")).unwrap();
        assert_eq!(link, Path::new("../../blobs").join(&etag));
    }
    assert!(!snapshot.join("README.md").exists() && !cache.path().join("evil").exists());
    let blobs = std::fs::read_dir(folder.join("blobs")).unwrap().flatten();
    assert!(blobs.map(|e| e.file_name()).all(|n| !n.to_string_lossy().ends_with(".incomplete")));

    let bearer = format!("Bearer {TOKEN}");
    assert!(server.asked().iter().all(|a| a.header("authorization") == Some(&bearer)));
    assert!(!cdn.asked().is_empty());
    assert!(cdn.asked().iter().all(|a| a.header("authorization").is_none()));
    assert!(!format!("{:?}", cdn.asked()).contains(TOKEN));

    // Whole, it is used without a word to the hub; by its commit too, and offline.
    let before = server.asked().len();
    assert_eq!(hub.model("org/net").unwrap(), snapshot);
    assert_eq!(hub.model(&format!("org/net@{COMMIT}")).unwrap(), snapshot);
    assert_eq!(hub.clone().offline().model("org/net").unwrap(), snapshot);
    assert_eq!(server.asked().len(), before);
    // Another revision at the same commit has nothing to fetch but the list.
    assert_eq!(hub.model("org/net@refs/pr/1").unwrap(), snapshot);
    assert_eq!(server.asked().len(), before + 1);
    assert_eq!(std::fs::read_to_string(folder.join("refs/refs/pr/1")).unwrap(), COMMIT);
    let error = hub.offline().model("org/net@v9").unwrap_err().to_string();
    assert!(error.contains("HF_HUB_OFFLINE") && error.contains("refs/v9"), "{error}");
    assert_eq!(server.asked().len(), before + 1);
}

#[test]
fn a_broken_transfer_goes_on_where_it_stopped() {
    // Each connection breaks after 3000 bytes.
    let cdn = Server::new(|asked| {
        let whole = ranged(asked, &weights());
        let sent = whole.body.len().min(3000);
        whole.broken_after(sent)
    });
    let server = net(cdn.address.clone(), sha256(&weights()));
    let cache = tempfile::tempdir().unwrap();
    let snapshot = hub(cache.path(), &server).model("org/net").unwrap();
    assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), weights());
    let from: Vec<usize> = cdn.asked().iter().map(Asked::from).collect();
    assert_eq!(from, [0, 3000, 6000]);
}

#[test]
fn the_next_run_resumes_what_an_earlier_one_left() {
    let etag = sha256(&weights());
    let cache = tempfile::tempdir().unwrap();
    let incomplete = cache.path().join("models--org--net/blobs").join(format!("{etag}.incomplete"));
    // A server that gives 100 bytes once and then nothing.
    let cdn = Server::new(|asked| match asked.from() {
        0 => ranged(asked, &weights()).broken_after(100),
        _ => answer(500),
    });
    let server = net(cdn.address.clone(), etag.clone());
    let error = hub(cache.path(), &server).model("org/net").unwrap_err();
    assert_eq!(error.exit_code(), 1);
    assert!(error.to_string().contains("model.safetensors") && error.to_string().contains("500"), "{error}");
    assert_eq!(std::fs::metadata(&incomplete).unwrap().len(), 100);
    // What is not whole is not found.
    assert!(hub(cache.path(), &server).offline().model("org/net").is_err());

    let cdn = Server::new(|asked| ranged(asked, &weights()));
    let server = net(cdn.address.clone(), etag.clone());
    let snapshot = hub(cache.path(), &server).model("org/net").unwrap();
    assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), weights());
    assert_eq!(cdn.asked().iter().map(Asked::from).collect::<Vec<_>>(), [100]);
    assert!(!incomplete.exists());
    // Nor was what had come whole before asked for again.
    assert_eq!(server.count("HEAD", "config.json"), 0);
}

#[test]
fn servers_that_know_no_ranges_start_over() {
    for status in [200, 416] {
        let cdn = Server::new(move |asked| match (asked.from(), status) {
            (0, _) | (_, 200) => answer(200).body(weights()),
            _ => answer(416),
        });
        let etag = sha256(&weights());
        let server = net(cdn.address.clone(), etag.clone());
        let cache = tempfile::tempdir().unwrap();
        let blobs = cache.path().join("models--org--net/blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(blobs.join(format!("{etag}.incomplete")), vec![7; 50]).unwrap();
        let snapshot = hub(cache.path(), &server).model("org/net").unwrap();
        assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), weights());
        let asked = cdn.asked();
        assert_eq!(asked.iter().map(Asked::from).max(), Some(50));
        assert_eq!(asked.len(), if status == 200 { 1 } else { 2 });
    }
}

#[test]
fn bytes_that_are_not_the_files_are_refused() {
    let cdn = Server::new(|asked| {
        let mut bytes = weights();
        bytes[500] ^= 1;
        ranged(asked, &bytes)
    });
    let etag = sha256(&weights());
    let server = net(cdn.address.clone(), etag.clone());
    let cache = tempfile::tempdir().unwrap();
    let error = hub(cache.path(), &server).model("org/net").unwrap_err();
    assert_eq!(error.exit_code(), 4);
    for part in ["model.safetensors", "SHA-256", &etag] {
        assert!(error.to_string().contains(part), "{error}");
    }
    let blobs = std::fs::read_dir(cache.path().join("models--org--net/blobs")).unwrap().flatten();
    assert!(blobs.map(|e| e.file_name()).all(|n| !n.to_string_lossy().contains(&etag)));
}

#[test]
fn refusals_are_told_apart_in_one_line_without_the_token() {
    for (status, code, words) in [
        (401, 4, ["401", "token still good"]),
        (403, 4, ["403", "terms"]),
        (404, 4, ["404", "no such file or folder"]),
        (500, 1, ["500", "the list of files"]),
        (503, 1, ["503", "127.0.0.1"]),
    ] {
        let server = Server::new(move |_| answer(status));
        let cache = tempfile::tempdir().unwrap();
        let hub = hub(cache.path(), &server).with_token(TOKEN).unwrap();
        let error = hub.model("org/net").unwrap_err();
        assert_eq!(error.exit_code(), code, "{error}");
        let error = error.to_string();
        assert!(!error.contains('\n') && !error.contains(TOKEN), "{error}");
        for word in words.into_iter().chain(["org/net@main"]) {
            assert!(error.contains(word), "{error}: no {word}");
        }
        // What may pass is asked again, what does not is not.
        assert_eq!(server.asked().len(), if status >= 500 { 4 } else { 1 });
    }
    let server = Server::new(|_| answer(401));
    let cache = tempfile::tempdir().unwrap();
    let error = hub(cache.path(), &server).model("org/net").unwrap_err().to_string();
    assert!(error.contains("HF_TOKEN"), "{error}");
}

#[test]
fn a_hub_that_stumbles_once_is_asked_again() {
    let stumbled = Mutex::new(false);
    let server = Server::new(move |asked| {
        let first = !std::mem::replace(&mut *stumbled.lock().unwrap(), true);
        match asked.path.as_str() {
            _ if first => answer(503),
            "/api/models/org/net/revision/main" => list(&["config.json", "model.safetensors"]),
            path if path.ends_with("/config.json") => small(asked, "{}"),
            _ => small(asked, "weights"),
        }
    });
    let cache = tempfile::tempdir().unwrap();
    let snapshot = hub(cache.path(), &server).model("org/net").unwrap();
    assert_eq!(std::fs::read_to_string(snapshot.join("model.safetensors")).unwrap(), "weights");
}

#[test]
fn redirects_that_do_not_end_or_lead_nowhere_are_errors() {
    for (location, word) in [("/loop", "redirects"), ("ftp://a/b", "no address"), ("", "no address")] {
        let server = Server::new(move |_| answer(302).with("Location", location));
        let cache = tempfile::tempdir().unwrap();
        let error = hub(cache.path(), &server).model("org/net").unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[test]
fn lists_and_etags_that_lie_do_not_lead_out_of_the_cache() {
    let server = Server::new(|asked| match asked.path.as_str() {
        path if path.starts_with("/api/") => list(&["config.json", "model.safetensors"]),
        _ => answer(200).with("ETag", "\"../../../evil\"").body("{}"),
    });
    let cache = tempfile::tempdir().unwrap();
    let error = hub(cache.path(), &server).model("org/net").unwrap_err().to_string();
    assert!(error.contains("etag"), "{error}");
    let server = Server::new(|_| answer(200).body(r#"{"sha": "../../evil", "siblings": []}"#));
    let error = hub(cache.path(), &server).model("org/net").unwrap_err().to_string();
    assert!(error.contains("names no commit"), "{error}");
    let server = Server::new(|_| list(&["config.json"]));
    let error = hub(cache.path(), &server).model("org/other").unwrap_err().to_string();
    assert!(error.contains("etag") || error.contains("model.safetensors"), "{error}");
}

/// A hub with the data set `org/words`.
fn words() -> Server {
    Server::new(|asked| match asked.path.as_str() {
        "/api/datasets/org/words/revision/main" => {
            list(&["README.md", "train.jsonl", "test.jsonl", "train.png", "short/train-00000.jsonl"])
        }
        path if path.starts_with("/datasets/org/words/resolve/") && path.ends_with(".jsonl") => {
            let name = path.rsplit('/').next().unwrap();
            let line = format!("{{\"prompt\": \"{name}\", \"completion\": \"yes\"}}\n");
            small(asked, &line.repeat(20))
        }
        _ => answer(404),
    })
}

#[test]
fn data_sets_come_by_their_splits() {
    let server = words();
    let cache = tempfile::tempdir().unwrap();
    let hub = hub(cache.path(), &server);
    let folder = hub.data("org/words").unwrap();
    let snapshot = cache.path().join("datasets--org--words/snapshots").join(COMMIT);
    assert_eq!(folder, snapshot);
    let mut names: Vec<_> = std::fs::read_dir(&folder).unwrap().flatten().map(|e| e.file_name()).collect();
    names.sort();
    assert_eq!(names, ["test.jsonl", "train.jsonl"]);
    // A folder of it, and again: only the list is asked for.
    let part = hub.data("org/words/short").unwrap();
    assert_eq!(part, snapshot.join("short"));
    assert!(part.join("train-00000.jsonl").exists());
    let before = server.asked().len();
    hub.data("org/words").unwrap();
    assert_eq!(server.asked().len(), before + 1);
    assert!(hub.data("org/words/none").unwrap_err().to_string().contains("short"));
    // Offline and with the hub gone, what is there serves.
    assert_eq!(hub.clone().offline().data("org/words").unwrap(), snapshot);
    let gone = hub.with_endpoint("http://127.0.0.1:9").unwrap();
    assert_eq!(gone.data("org/words").unwrap(), snapshot);
    assert_eq!(gone.data("org/others").unwrap_err().exit_code(), 1);
}

/// The program with this hub in its environment.
fn qtune(dir: &Path, server: &Server) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qtune"));
    command.current_dir(dir).env("HF_HOME", dir.join("hf")).env("HF_ENDPOINT", &server.address);
    command.env_remove("HF_HUB_CACHE").env_remove("HF_TOKEN").env_remove("HF_HUB_OFFLINE");
    command.env_remove("HF_TOKEN_PATH").env("RUST_LOG", "trace");
    command
}

#[test]
fn the_program_takes_hub_names_and_says_no_token() {
    let dir = tempfile::tempdir().unwrap();
    let server = words();
    std::fs::create_dir(dir.path().join("hf")).unwrap();
    std::fs::write(dir.path().join("hf/token"), format!("{TOKEN}\n")).unwrap();
    let out = qtune(dir.path(), &server).args(["data", "org/words"]).output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}");
    assert!(said.contains("train.jsonl") && said.contains("yes"), "{said}");
    assert!(!said.contains(TOKEN), "{said}");
    let bearer = format!("Bearer {TOKEN}");
    assert!(server.asked().iter().all(|a| a.header("authorization") == Some(&bearer)));
    assert!(dir.path().join("hf/hub/datasets--org--words/refs/main").exists());
    // Offline it is found again.
    let mut again = qtune(dir.path(), &server);
    let out = again.env("HF_HUB_OFFLINE", "1").args(["data", "org/words"]).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));

    let mut inspect = qtune(dir.path(), &server);
    let out = inspect.args(["inspect", "org/absent"]).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(4), "{said}");
    assert!(said.contains("org/absent@main") && !said.contains(TOKEN), "{said}");
}
